// Everything that the open workflow lacks, in one dialog: when it opens, and when a command asks for it.

import { app } from '../../../scripts/app.js'
import { lacking } from './badges.js'
import { dialog } from './dialog.js'
import { fetchAll } from './downloads.js'
import { t } from './i18n.js'

export const OFFER = 'QuantizedTransformers.OfferDownloads'
const KEPT = 'quantizedtransformers.offered' // references that this tab has offered already

let held = false

/** Run something that opens a workflow and talks of it first: nothing is offered before it has ended. */
export async function before(action) {
  held = true
  try {
    return await action()
  } finally {
    held = false
  }
}

/** Where a workflow that opens lacks what was not offered before, offer it, unless the user has switched that off. */
export async function offerMissing() {
  if (held || !app.extensionManager.setting.get(OFFER)) return
  const asked = await lacking()
  const offered = new Set(JSON.parse(sessionStorage.getItem(KEPT) ?? '[]'))
  if (asked.every(({ reference }) => offered.has(reference)) || document.querySelector('dialog[open]')) return
  asked.forEach(({ reference }) => offered.add(reference))
  sessionStorage.setItem(KEPT, JSON.stringify([...offered]))
  await fetchAll(asked)
}

/** The command: whatever is missing, or that nothing is. */
export async function downloadMissing() {
  const asked = await lacking()
  if (asked.length) await fetchAll(asked)
  else await dialog(t('downloadTitle'), t('nothingMissing'))
}
