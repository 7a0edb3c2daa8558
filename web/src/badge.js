// What one node shows of the checkpoint that it refers to: family, architecture, verdict; the formats as a bar; size
// and memory, or what is wrong, or a download. Three lines, always, so that nodes do not change their size.

import { app } from '../../../scripts/app.js'
import { chosen, counts, showDetails } from './details.js'
import { el, size } from './dom.js'
import { failed, follow, offer } from './downloads.js'
import { t } from './i18n.js'
import { colour } from './known.js'
import { question, referenceOf, valueOf } from './nodes.js'
import { call } from './server.js'
import { showVariants } from './variants.js'

const HEIGHT = 66 // of the widget on the classic canvas, with its margins
const MARGIN = 6
const DEFERRED = 'deferred' // a base whose weights come from an override
const SLOW = 150 // milliseconds after which a badge says that it is waiting

export class Badge {
  #asked = null // what the shown answer was asked for, as JSON
  #shown = null // that answer: the same again leaves everything in place, under the pointer and with the focus
  #reference = null
  #request = null
  #jobs = new Set() // references whose download is followed; more than one where the node was set to another meanwhile
  #asking = false // whether a download is being agreed on

  /** `lacking` asks what all nodes of the workflow lack. */
  constructor(node, lacking) {
    this.node = node
    this.lacking = lacking
    this.element = el('div', { className: 'qt-badge', role: 'group', aria: { label: t('badge') }, on: { wheel: zoom } })
    const widget = node.addDOMWidget('checkpoint_info', 'qt_checkpoint_info', this.element, {
      serialize: false, hideInPanel: true, margin: MARGIN, getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT
    })
    widget.serialize = false // the option keeps it out of prompts, this one out of saved workflows
    const least = node.computeSize()
    node.setSize([Math.max(node.size[0], least[0]), Math.max(node.size[1], least[1])])
    this.#show('empty', t('noReference'))
  }

  /** What is asked, where the answer is that it is not here and can be downloaded; else null. */
  lacks = null

  /** Ends when what is asked now is answered. */
  settled = Promise.resolve()

  /** Ask again where the node refers to something else than what is shown, or where `force` says so. */
  update(force) {
    this.settled = Promise.all([this.settled, this.#update(force)])
  }

  async #update(force) {
    const asked = question(this.node)
    const key = JSON.stringify(asked)
    const again = key === this.#asked
    if (again && !force) return
    this.#asked = key
    this.#reference = asked?.reference
    this.#request?.abort()
    this.lacks = null
    if (!asked) {
      this.#show('empty', t(referenceOf(this.node) === null ? 'linked' : 'noReference'))
      return
    }
    const request = this.#request = new AbortController()
    const slow = setTimeout(() => again || this.#show('loading', t('looking')), SLOW)
    try {
      const known = await call('describe', { query: asked, signal: request.signal })
      if (request === this.#request) this.#describe(asked, known)
    } catch (error) {
      if (request !== this.#request) return
      // a path outside of the model folders is no business of a web page; the node itself may load it
      if (error.status === 403) this.#show('empty', t('loadsWhenRun'), error.full)
      else this.#show('error', error.message, error.full)
    } finally {
      clearTimeout(slow)
    }
  }

  /** End what is under way here; a download goes on in the server. */
  remove() {
    this.#request?.abort()
    this.#asked = null
  }

  get #downloading() {
    return this.#jobs.has(this.#reference)
  }

  #describe(asked, known) {
    if (this.#downloading) return
    if (known.downloading) {
      this.#follow(asked.reference, known.downloading)
      return
    }
    if (!known.on_disk && known.download) this.lacks = asked
    const shown = JSON.stringify([asked, known])
    if (shown === this.#shown) return
    const formats = known.formats.toSorted((a, b) => b.layers - a.layers)
    const auto = valueOf(this.node, 'precision') === 'auto' || valueOf(this.node, 'rank') === 0
    const wrong = known.mismatch ?? known.problems?.[0]
    const memory = known.vram && t('needs', { size: size(known.vram) })
    const facts = [formats.length && size(known.size), memory, chosen(known, auto)].filter(Boolean).join(' · ')
    const { title, mismatch, problems, hint, notes } = known
    const [verdict, why] = mismatch ? ['red', mismatch] : [known.verdict, known.verdict_text]
    const judged = known.family !== DEFERRED && (known.on_disk || known.architecture) // nothing of a base's is multiplied
    const said = [title, ...problems, why, counts(formats), hint, ...notes].filter(Boolean).join('\n')
    const offer = !known.on_disk && known.download && el('button', {
      type: 'button', className: 'qt-main qt-download', on: { click: () => this.#download(asked, offer) }
    }, t('download'))
    const words = t(`verdict_${verdict}`)
    this.#fill(known.on_disk ? 'ready' : 'missing', said, mismatch ? 'mismatch' : wrong ? 'problem' : '',
      line(
        known.family && el('b', { className: 'qt-family' }, known.family === DEFERRED ? t(DEFERRED) : known.family),
        el('span', { className: 'qt-text' }, known.architecture || title),
        known.model && el('button', {
          type: 'button', className: 'qt-forms', title: t('variantsOf', { model: known.model }),
          aria: { label: t('variantsOf', { model: known.model }) },
          on: { click: () => showVariants(asked.reference, this.node).catch(failed) }
        }, '⇄'),
        judged && el('span', {
          className: 'qt-verdict', title: why, data: { verdict }, tabIndex: 0, aria: { label: `${words}. ${why}` }
        }, words)),
      line(bar(formats, () => showDetails(asked, this.node)), wrong ? null : el('small', {}, counts(formats))),
      wrong ? el('div', { className: 'qt-wrong', role: 'alert' }, wrong) : line(
        el('span', { className: 'qt-text', role: 'status' }, facts || hint || (known.on_disk ? why : t('notOnDisk'))),
        offer))
    this.#shown = shown
  }

  /** Ask what there is to download, then the user, then the server. */
  async #download(asked, button) {
    if (this.#asking) return
    this.#asking = true
    button.textContent = t('asking') // the Hub may take its time
    try {
      const id = await offer([asked], await this.lacking())
      if (id) await this.#follow(asked.reference, id)
    } catch (error) {
      failed(error)
    } finally {
      this.#asking = false
      button.textContent = t('download')
    }
  }

  /** Show a download, which this page or another one has started, until it ends. */
  async #follow(reference, id) {
    const cancel = new AbortController()
    this.#jobs.add(reference)
    try {
      await follow(id, cancel.signal, (state) => this.#progress(reference, state, cancel))
    } catch (error) {
      failed(error)
    } finally {
      this.#jobs.delete(reference)
      this.update(true)
    }
  }

  #progress(reference, { done, total, file }, cancel) {
    if (reference !== this.#reference) return
    const ending = cancel.signal.aborted
    const click = () => cancel.abort()
    const stop = el('button', { type: 'button', className: 'qt-cancel', disabled: ending, on: { click } }, t('cancel'))
    const focused = this.element.contains(document.activeElement)
    this.#fill('downloading', file, '',
      line(el('span', { className: 'qt-text' }, reference), stop),
      el('progress', { max: total || 1, value: done, aria: { label: t('downloading') } }),
      line(el('span', { className: 'qt-text', role: 'status' },
        ending ? t('cancelling') : file ? t('progress', { done: size(done), total: size(total), file }) : t('starting'))))
    if (focused) stop.focus()
  }

  #show(state, text, title = text) {
    if (this.#downloading) return
    this.#fill(state, title, state === 'error' ? 'problem' : '', line(
      el('span', { className: state === 'error' ? 'qt-text qt-wrong' : 'qt-text', role: 'status' }, text)))
  }

  #fill(state, title, mark, ...lines) {
    this.#shown = null
    this.element.dataset.state = state
    this.element.dataset.mark = mark
    this.element.title = title
    this.element.replaceChildren(...lines)
  }
}

const line = (...parts) => el('div', { className: 'qt-line' }, parts)

/** The formats as parts of a bar, as wide as they have layers. */
function bar(formats, click) {
  const words = `${counts(formats) || t('noLayers')}\n${t('openMap')}`
  return el('button', { type: 'button', className: 'qt-bar', title: words, aria: { label: words }, on: { click } },
    formats.map(({ format, layers }) => {
      const part = el('i', {})
      part.style.flexGrow = layers
      part.style.background = colour(format)
      return part
    }))
}

/** Over a badge the wheel zooms as it does beside it; Vue nodes pass it on themselves. */
function zoom(event) {
  if (!LiteGraph.vueNodesMode) app.canvas.processMouseWheel(event)
}
