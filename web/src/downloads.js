// Downloads: what nodes lack is asked for in one dialog, fetched by the server as one job, watched, and cancelled by hand.

import { app } from '../../../scripts/app.js'
import { dialog, facts, list } from './dialog.js'
import { el, size } from './dom.js'
import { t } from './i18n.js'
import { call, RouteError } from './server.js'
import { HUB, HUBS, TARGET, TARGETS } from './targets.js'

const EVERY = 400 // milliseconds between two looks at the server
const ENDED = ['done', 'failed', 'cancelled']
/** Tells of downloads that begin and end ("change"): other nodes may wait for the same files. */
export const downloads = new EventTarget()
const told = new Set() // ids of jobs whose end was told: several badges may follow one

/**
 * Ask the hubs what nodes lack, then the user what of it to download, and where to: the id of the download, or null.
 * `asked` are questions as for `describe`; `all`, where there are more, those of the whole workflow.
 */
export async function offer(asked, all = asked) {
  for (;;) {
    const choice = new Choice(asked)
    await choice.plan()
    const more = all.length > asked.length && { value: 'all', label: t('everything', { count: all.length }) }
    const answer = await dialog(t('downloadTitle'), choice.element, [
      ...(more ? [more] : []),
      { value: 'start', label: () => t('downloadSize', { size: size(choice.bytes) }), main: true, ready: () => choice.ready }
    ])
    if (answer === null) return null
    if (answer === 'start') {
      const { id } = await call('download', { method: 'POST', body: choice.body })
      changed()
      return id
    }
    asked = all
  }
}

/** What is offered: a row for each repo that lacks something, the licences, where to, and how much room there is. */
class Choice {
  element = el('div', { className: 'qt-offer' })
  #plan = { rows: [], bytes: 0, free: null }
  #left = new Set() // repos that the user does not want
  #accepted = new Set() // repos whose licence was accepted

  constructor(asked) {
    this.asked = asked
    this.element.addEventListener('change', () => this.#sum())
  }

  async plan() {
    this.#plan = await call('download', { method: 'POST', body: { ...this.#common, plan: true } })
    this.#show()
  }

  get #common() {
    const hub = setting(HUB)
    return { items: this.asked, target: setting(TARGET), ...(hub !== 'auto' && { hub }) }
  }

  get #rows() {
    return this.#plan.rows.filter(({ error, repo }) => !error && !this.#left.has(repo))
  }

  /** A file that two rows share, a base as a base and as an override, is counted once. */
  get bytes() {
    const whole = this.#rows.length === this.#plan.rows.filter(({ error }) => !error).length
    return whole ? this.#plan.bytes : this.#rows.reduce((sum, { bytes }) => sum + bytes, 0)
  }

  get ready() {
    return this.#rows.length > 0 && this.#rows.every(({ gated, repo }) => !gated || this.#accepted.has(repo))
      && (this.#plan.free === null || this.bytes <= this.#plan.free)
  }

  /** What is fetched: the questions that need no repo which was left out, or cannot be had. */
  get body() {
    const unwanted = new Set(this.#plan.rows.filter((row) => !this.#rows.includes(row)).flatMap(({ items }) => items))
    const wanted = new Set(this.#rows.flatMap(({ items }) => items))
    return {
      ...this.#common, items: this.asked.filter((_, i) => wanted.has(i) && !unwanted.has(i)), licences: [...this.#accepted]
    }
  }

  #show() {
    const { rows, free } = this.#plan
    const gated = new Map(rows.filter((row) => row.gated).map((row) => [row.repo, row.licence]))
    this.sum = el('p', { role: 'status' })
    this.element.replaceChildren(...[
      el('ul', { className: 'qt-rows' }, rows.map((row) => this.#row(row))),
      rows.length === 0 && el('p', {}, t('nothingMissing')),
      gated.size > 0 && el('div', { className: 'qt-licence' }, el('p', {}, t('gated')),
        [...gated].map(([repo, licence]) => el('label', {}, this.#tick(this.#accepted, repo), ' ', t('accept'), ' ',
          el('a', { href: licence, target: '_blank', rel: 'noreferrer' }, licence)))),
      el('div', { className: 'qt-choices' },
        el('label', { className: 'qt-hub' }, t('downloadFrom'), ' ', this.#select(HUB, HUBS, 'hub')),
        el('label', { className: 'qt-target' }, t('downloadTo'), ' ', this.#select(TARGET, TARGETS, 'target'))),
      facts([[t('free'), free !== null && size(free)]]), this.sum
    ].filter(Boolean))
    this.element.dispatchEvent(new Event('change', { bubbles: true }))
  }

  #row(row) {
    const { hub, repo, files, bytes, least, folder, error } = row
    if (error) return el('li', { className: 'qt-wrong-row' }, el('b', {}, repo), el('small', { role: 'alert' },
      [error.error, error.todo].filter(Boolean).join(': ')))
    const names = Object.entries(files)
    const wanted = this.#tick(this.#left, repo, false)
    return el('li', {},
      el('label', {}, wanted, ' ', el('b', {}, repo), hub !== 'huggingface' && el('small', {}, t(`hub_${hub}`)),
        el('span', {}, least ? t('atLeast', { size: size(bytes) }) : size(bytes))),
      el('details', { open: this.#plan.rows.length === 1 }, el('summary', {}, t('filesTo', { count: names.length, folder })),
        list(names.map(([name, count]) => `${name} (${size(count)})`))))
  }

  /** A checkbox for membership of a set, or of the rest. */
  #tick(set, value, member = true) {
    const box = el('input', { type: 'checkbox', checked: set.has(value) === member })
    box.addEventListener('change', () => box.checked === member ? set.add(value) : set.delete(value))
    return box
  }

  /** The choices of a setting; another one changes what there is to fetch. */
  #select(name, values, key) {
    const select = el('select', {}, values.map((value) => (
      el('option', { value, selected: value === setting(name) }, t(`${key}_${value}`)))))
    select.addEventListener('change', async () => {
      await app.extensionManager.setting.set(name, select.value) // remembered, as in the settings
      await this.plan().catch(failed)
    })
    return select
  }

  #sum() {
    const short = this.#plan.free !== null && this.bytes > this.#plan.free
    if (this.sum) this.sum.textContent = short ? t('tooLittleRoom', { size: size(this.bytes - this.#plan.free) }) : t('resumes')
  }
}

/**
 * Follow a download. `show` is called with every state {state, done, total, file, errors}; the promise ends with the
 * last one, whose errors are told once. `signal` cancels it on the server too.
 */
export async function follow(id, signal, show) {
  let state = { state: 'running', done: 0, total: 0 }
  let cancelled = false
  while (!ENDED.includes(state.state)) {
    show(state)
    await Promise.race([sleep(EVERY), aborted(signal)])
    if (signal.aborted && !cancelled) {
      cancelled = true
      await call('download', { method: 'DELETE', query: { id } })
    }
    state = await call('download', { query: { id } })
  }
  if (!told.has(id)) {
    told.add(id)
    state.errors.forEach((error) => failed(new RouteError(error)))
    changed()
  }
  return state
}

/** Show a download in a dialog until it ends, or until the user hides it: it goes on, and nodes show it. */
export async function watch(id) {
  const cancel = new AbortController()
  const bar = el('progress', { aria: { label: t('downloading') } })
  const text = el('p', { role: 'status' }, t('starting'))
  const end = follow(id, cancel.signal, ({ done, total, file }) => {
    Object.assign(bar, { max: total || 1, value: done })
    text.textContent = cancel.signal.aborted ? t('cancelling')
      : file ? t('progress', { done: size(done), total: size(total), file }) : t('starting')
  })
  const shown = dialog(t('downloading'), el('div', { className: 'qt-offer' }, bar, text),
    [{ value: 'cancel', label: t('cancel') }], { last: t('hide'), until: end.catch(() => null) })
  if (await shown === 'cancel') cancel.abort()
  return end
}

/** Offer what these questions need, fetch what is agreed to, and show it. */
export async function fetchAll(asked) {
  try {
    const id = await offer(asked)
    const end = id && await watch(id)
    if (end?.state === 'done') app.extensionManager.toast.add({ severity: 'success', summary: t('downloaded'), life: 8000 })
  } catch (error) {
    failed(error)
  }
}

const setting = (name) => app.extensionManager.setting.get(name)
const changed = () => downloads.dispatchEvent(new Event('change'))

/** Tell of an error that something ended with: a download, unless `summary` says what. */
export function failed(error, summary = t('downloadFailed')) {
  const detail = error.full ?? error.message
  app.extensionManager.toast.add({ severity: 'error', summary, detail, life: 20000 })
}

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds))
const aborted = (signal) => new Promise((done) => signal.addEventListener('abort', done, { once: true }))
