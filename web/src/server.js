// The routes under /quantized_transformers (routes.py).

import { api } from '../../../scripts/api.js'
import { language, t } from './i18n.js'

/** What a route refused: what is wrong, where, and what to do. */
export class RouteError extends Error {
  constructor({ error, where, todo }, status) {
    super(error || t('noAnswer'))
    Object.assign(this, { where, todo, status })
  }

  get full() {
    return [this.message, this.where, this.todo].filter(Boolean).join('\n')
  }
}

/** The JSON answer of a route. Raises RouteError for what it refuses, AbortError when `signal` says so. */
export async function call(name, { query = {}, method = 'GET', body, signal } = {}) {
  const asked = new URLSearchParams(query).toString()
  const response = await api.fetchApi(`/quantized_transformers/${name}${asked && `?${asked}`}`, {
    method, signal, ...(body && { body: JSON.stringify(body) }),
    headers: { 'Accept-Language': language(), ...(body && { 'Content-Type': 'application/json' }) }
  })
  const answer = await response.json().catch(() => ({}))
  if (!response.ok) throw new RouteError(answer, response.status)
  return answer
}

let told = ''

/** Have prompts that this page queues answered in its language, too: the server is told when it knows the page. */
export function speak() {
  api.addEventListener('status', tell)
  api.addEventListener('reconnected', () => { told = '' }) // the server may have been started again
  tell()
}

function tell() {
  const { clientId: client } = api
  if (!client || told === client + language()) return
  told = client + language()
  call('language', { method: 'POST', body: { client } }).catch(() => { told = '' })
}
