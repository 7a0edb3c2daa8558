// Elements without markup: text that came from a file's name or a server can never become HTML.

/**
 * An element with its properties and children. `on` holds event listeners, `data` data attributes, `aria` and `role`
 * ARIA's; the other properties are set as they are. Strings become text; what is empty, and 0, becomes nothing.
 */
export function el(tag, { on = {}, data = {}, aria = {}, role, ...properties } = {}, ...children) {
  const element = document.createElement(tag)
  Object.assign(element, properties)
  Object.assign(element.dataset, data)
  if (role) element.setAttribute('role', role)
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value)
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener)
  element.append(...children.flat().filter(Boolean))
  return element
}

/** A number of bytes as GB, MB or kB (powers of ten), as the pack's reports print it. */
export function size(bytes) {
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(2)} GB`
  return bytes >= 1e6 ? `${(bytes / 1e6).toFixed(2)} MB` : `${(bytes / 1e3).toFixed(1)} kB`
}
