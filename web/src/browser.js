// The checkpoint browser in the sidebar: what is on this machine and the known repos, to search, look at and drag.

import { app } from '../../../scripts/app.js'
import { el, size } from './dom.js'
import { showDetails } from './details.js'
import { fetchAll } from './downloads.js'
import { t } from './i18n.js'
import { place } from './place.js'
import { call } from './server.js'

const AGAIN = 1000 // milliseconds until the server is asked again while it still reads headers

export function sidebarTab() {
  let browser
  return {
    id: 'quantized-transformers',
    icon: 'pi pi-microchip',
    title: t('tab'),
    tooltip: t('sidebarTip'),
    type: 'custom',
    render: (container) => {
      browser?.close()
      browser = new Browser(container)
    },
    destroy: () => browser?.close()
  }
}

class Browser {
  #items = []
  #kinds = []
  #open = true
  #drag = null
  #rows = new Map() // reference -> {key, element}: what says the same as before stays as it is

  constructor(container) {
    const changed = { on: { input: () => this.#list() } }
    this.search = el('input', { type: 'search', placeholder: t('search'), aria: { label: t('search') }, ...changed })
    this.architecture = el('select', { aria: { label: t('architecture') }, ...changed })
    this.format = el('select', { aria: { label: t('format') }, ...changed })
    this.native = el('input', { type: 'checkbox', ...changed })
    this.here = el('input', { type: 'checkbox', ...changed })
    this.foreign = el('input', { type: 'checkbox', ...changed })
    this.results = el('ul', { className: 'qt-items' })
    this.status = el('p', { className: 'qt-status', role: 'status' })
    container.replaceChildren(el('section', { className: 'qt-browser', aria: { label: t('sidebar') } },
      el('header', {}, el('h2', {}, t('sidebar')), el('button', {
        type: 'button', title: t('refresh'), aria: { label: t('refresh') }, on: { click: () => this.#load() }
      }, '↻')),
      this.search,
      el('div', { className: 'qt-filters' }, this.architecture, this.format,
        el('label', {}, this.native, ' ', t('nativeOnly')), el('label', {}, this.here, ' ', t('onDiskOnly')),
        el('label', {}, this.foreign, ' ', t('foreignToo'))),
      this.status, this.results))
    this.#load()
  }

  close() {
    this.#open = false
    this.#drop()
  }

  async #load() {
    this.status.textContent = t('looking')
    try {
      const { items, kinds, architectures, formats, pending } = await call('catalog')
      this.#items = items
      this.#kinds = kinds
      fill(this.architecture, t('anyArchitecture'), architectures)
      fill(this.format, t('anyFormat'), formats)
      this.#list(pending)
      if (pending && this.#open) setTimeout(() => this.#open && this.#load(), AGAIN)
    } catch (error) {
      this.status.textContent = error.full ?? error.message
    }
  }

  #list(pending = false) {
    if (this.#drag) return // what is dragged must stay where it is
    const focused = this.results.contains(document.activeElement) && document.activeElement
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean)
    const shown = this.#items.filter((item) => {
      const text = `${item.title} ${item.reference} ${item.family} ${item.architecture}`.toLowerCase()
      return words.every((word) => text.includes(word))
        && (!this.architecture.value || item.architecture === this.architecture.value)
        && (!this.format.value || item.formats.includes(this.format.value))
        && (!this.native.checked || item.verdict === 'green')
        && (!this.here.checked || item.on_disk)
        && (!item.foreign || this.foreign.checked)
    })
    const all = this.#items.filter((item) => !item.foreign || this.foreign.checked).length
    this.status.textContent = pending ? t('looking') : t('shown', { shown: shown.length, all })
    const groups = this.#kinds.map((kind) => [kind, shown.filter((item) => item.kind === kind)])
      .filter(([, items]) => items.length)
    const { reference } = focused ? focused.closest('.qt-item').dataset : {}
    this.results.replaceChildren(...groups.map(([kind, items]) => el('li', {}, el('h3', {}, t(`kind_${kind}`)),
      el('ul', {}, items.map((item) => this.#row(item))))))
    if (!focused) return
    this.results.querySelector(`[data-reference="${CSS.escape(reference)}"] .${focused.className}`)?.focus()
  }

  #row(item) {
    const key = JSON.stringify(item)
    if (this.#rows.get(item.reference)?.key !== key) this.#rows.set(item.reference, { key, element: this.#item(item) })
    return this.#rows.get(item.reference).element
  }

  #item(item) {
    const formats = item.formats.join(', ')
    const own = formats !== item.family && formats
    const facts = [item.family, item.architecture, own, item.size && size(item.size)].filter(Boolean).join(' · ')
    return el('li', {
      className: 'qt-item', draggable: !item.foreign,
      data: { reference: item.reference, node: item.node, ...(item.foreign && { foreign: '' }) },
      on: { dragstart: (event) => this.#start(event, item), dragend: () => this.#drop() }
    },
    el('button', {
      type: 'button', className: 'qt-add', disabled: item.foreign, on: { click: () => place(item) },
      title: item.foreign ? `${item.reference}\n${item.verdict_text}` : `${item.reference}\n${t('addTip')}`
    }, el('span', { className: 'qt-name' }, item.title), el('small', {}, facts)),
    item.foreign && el('span', { className: 'qt-foreign', title: item.verdict_text }, t('foreign')),
    item.verdict && (item.on_disk
      ? el('span', { className: 'qt-verdict', data: { verdict: item.verdict }, title: item.verdict_text },
        t(`verdict_${item.verdict}`))
      : el('button', {
        type: 'button', className: 'qt-get', title: item.verdict_text, aria: { label: `${t('download')}: ${item.title}` },
        on: { click: () => fetchAll([{ reference: item.reference, node: item.node }]).then(() => this.#load()) }
      }, t('download'))),
    !item.foreign && el('button', {
      type: 'button', className: 'qt-look', title: t('openMap'), aria: { label: `${t('openMap')}: ${item.title}` },
      on: { click: () => showDetails({ reference: item.reference, node: item.node }) }
    }, '▦'))
  }

  // The graph takes the drop only while something of this list is dragged; the listeners are gone afterwards.
  #start(event, item) {
    event.dataTransfer.effectAllowed = 'copy'
    event.dataTransfer.setData('text/plain', item.reference)
    this.#drop()
    const over = (moved) => {
      moved.preventDefault()
      moved.dataTransfer.dropEffect = 'copy'
    }
    const drop = (dropped) => {
      dropped.preventDefault()
      dropped.stopImmediatePropagation()
      place(item, [...app.clientPosToCanvasPos([dropped.clientX, dropped.clientY])])
      this.#drop()
    }
    const area = app.canvas.canvas.closest('#graph-canvas-container') ?? app.canvas.canvas
    area.addEventListener('dragover', over, true)
    area.addEventListener('drop', drop, true)
    this.#drag = () => {
      area.removeEventListener('dragover', over, true)
      area.removeEventListener('drop', drop, true)
    }
  }

  #drop() {
    this.#drag?.()
    this.#drag = null
  }
}

function fill(select, any, values) {
  const before = select.value
  select.replaceChildren(el('option', { value: '' }, any), ...values.map((value) => el('option', { value }, value)))
  select.value = values.includes(before) ? before : ''
}
