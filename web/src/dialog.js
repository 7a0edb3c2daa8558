// One modal dialog at a time, the browser's own: it traps the focus, closes with Escape and gives the focus back.

import { app } from '../../../scripts/app.js'
import { el } from './dom.js'
import { t } from './i18n.js'

/**
 * Show a dialog and resolve to the value of the button that closed it: `buttons` are {value, label, main, ready}, where
 * `ready` says whether it can be pressed; it and a `label` that is a function are asked again with every change inside.
 * Escape and the last button, which `last` names, give null; so does the end of the promise `until`, which closes it.
 */
export function dialog(title, content, buttons = [], { last = t(buttons.length ? 'cancel' : 'close'), until } = {}) {
  const heading = el('h2', { id: 'qt-dialog-title' }, title)
  const box = el('dialog', { className: 'qt-dialog', aria: { labelledby: heading.id } })
  return new Promise((resolve) => {
    const close = (value) => {
      box.close()
      resolve(value)
    }
    const row = buttons.map(({ value, label, main, ready }) => {
      const button = el('button', { type: 'button', className: main ? 'qt-main' : '', on: { click: () => close(value) } })
      const look = () => {
        button.textContent = typeof label === 'function' ? label() : label
        button.disabled = ready ? !ready() : false
      }
      box.addEventListener('change', look)
      look()
      return button
    })
    row.push(el('button', { type: 'button', on: { click: () => close(null) } }, last))
    box.append(el('div', { className: 'qt-frame' },
      heading,
      el('div', { className: 'qt-content', tabIndex: 0 }, content),
      el('div', { className: 'qt-buttons' }, row)))
    box.addEventListener('cancel', (event) => {
      event.preventDefault()
      close(null)
    })
    box.addEventListener('close', () => box.remove())
    box.addEventListener('click', (event) => { if (event.target === box) close(null) }) // outside of the frame
    box.addEventListener('keydown', (event) => event.stopPropagation()) // typing here is no shortcut of the graph
    app.canvas.canvas.parentElement.append(box) // shown in the browser's top layer, wherever it is
    box.showModal()
    until?.then(() => box.open && close(null))
  })
}

/** Rows of a name and what it says; a value may be an element. Those that say nothing are left out. */
export function facts(rows) {
  return el('dl', { className: 'qt-facts' }, rows.filter(([, value]) => value)
    .flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, value)]))
}

/** A list of texts, or null for none. */
export const list = (texts) => texts?.length ? el('ul', {}, texts.map((text) => el('li', {}, text))) : null
