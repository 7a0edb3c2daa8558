// All that `describe` knows of a checkpoint, with its layer map, in a dialog.

import { el, size } from './dom.js'
import { dialog, facts, list } from './dialog.js'
import { fetchAll } from './downloads.js'
import { t } from './i18n.js'
import { layerMap } from './layer_map.js'
import { call } from './server.js'
import { showVariants } from './variants.js'

/** "8 FP8, 4 BF16" */
export const counts = (formats) => formats.map(({ format, layers }) => `${layers} ${format}`).join(', ')

/** "auto: int4, r32" where the node leaves them open, "int4, r32" where it says so; empty where there are none. */
export function chosen({ precision, rank }, open) {
  const parts = [precision, rank && `r${rank}`].filter(Boolean).join(', ')
  return parts && open ? `${t('auto')}: ${parts}` : parts
}

/** Ask for the checkpoint once more, with its layer map, and show everything. `node` is the one that refers to it. */
export async function showDetails(asked, node) {
  let content
  const buttons = []
  let title = asked.reference
  try {
    const known = await call('describe', { query: { ...asked, layers: 1 } })
    title = known.title || title
    if (known.model) buttons.push({ value: 'variants', label: t('variantsOf', { model: known.model }) })
    if (!known.on_disk && known.download) buttons.push({ value: 'download', label: t('download'), main: true })
    content = [facts([
      [t('reference'), known.reference],
      [t('family'), known.family],
      [t('architecture'), known.architecture],
      [t('layers'), counts(known.formats)],
      [t('size'), known.size && size(known.size)],
      [t('vram'), known.vram && `~ ${size(known.vram)}`],
      [t('chosen'), chosen(known, false)],
      [t('here'), known.verdict_text],
      [t('mismatch'), known.mismatch],
      [t('hint'), known.hint],
      [t('problems'), list(known.problems)],
      [t('notes'), list(known.notes)]
    ]), known.layer_map && layerMap(known.layer_map)]
  } catch (error) {
    content = el('pre', {}, error.full ?? error.message)
  }
  const answer = await dialog(title, content, buttons, { last: t('close') })
  if (answer === 'download') await fetchAll([asked])
  if (answer === 'variants') await showVariants(asked.reference, node)
}
