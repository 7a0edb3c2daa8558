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

/** A number of bytes in the unit that fits (TB, GB, MB, kB or B), as the pack's reports print it. */
export function size(bytes) {
  for (const [unit, factor, digits] of [['TB', 1e12, 2], ['GB', 1e9, 2], ['MB', 1e6, 2], ['kB', 1e3, 1]]) {
    if (bytes >= factor * 0.99995) return `${(bytes / factor).toFixed(digits)} ${unit}`
  }
  return `${Math.round(bytes)} B`
}
