// A download of a reference into the server's Hugging Face cache: asked for once, watched, and cancelled by hand.

import { dialog, facts, list } from './dialog.js'
import { el, size } from './dom.js'
import { t } from './i18n.js'
import { call } from './server.js'

const EVERY = 400 // milliseconds between two looks at the server

/**
 * Ask the Hub what is missing, then the user whether to download that: null, or what to send. The licence of a gated
 * repo has to be accepted first.
 */
export async function confirmDownload(asked) {
  const plan = await call('download', { method: 'POST', body: { ...asked, plan: true } })
  const { repo, files, bytes, gated, licence, free } = plan
  const accept = el('input', { type: 'checkbox' })
  const agreed = await dialog(t('downloadTitle'), [
    facts([
      [t('repo'), repo],
      [t('files'), files && list(Object.entries(files).map(([name, count]) => `${name} (${size(count)})`))],
      [t('size'), bytes ? size(bytes) : ''], [t('free'), size(free)]
    ]),
    el('p', {}, t('downloadWhere')),
    gated && el('div', { className: 'qt-licence' },
      el('p', {}, t('gated'), ' ', el('a', { href: licence, target: '_blank', rel: 'noreferrer' }, licence)),
      el('label', {}, accept, ' ', t('accept')))
  ], [{ value: true, label: t('download'), main: true, needs: gated ? accept : null }])
  return agreed && { ...asked, accept_licence: Boolean(gated) }
}

/** Start a download: its id. */
export const start = async (body) => (await call('download', { method: 'POST', body })).id

/**
 * Follow a download. `show` is called with every state {state, done, total, file, error}; the promise ends with the last
 * one. `signal` cancels it on the server too.
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
  return state
}

const ENDED = ['done', 'failed', 'cancelled']
const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds))
const aborted = (signal) => new Promise((done) => signal.addEventListener('abort', done, { once: true }))
