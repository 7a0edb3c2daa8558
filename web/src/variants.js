// The forms in which a model is published, the best for this machine first; one click takes one.

import { dialog } from './dialog.js'
import { el, size } from './dom.js'
import { fetchAll } from './downloads.js'
import { t } from './i18n.js'
import { question } from './nodes.js'
import { call } from './server.js'
import { take } from './take.js'

/** Show them for what a reference is a form of. `node`, where there is one, makes place for the form that is taken. */
export async function showVariants(reference, node) {
  const { model, device, memory, items } = await call('variants', { query: { reference } })
  let taken = null
  let close
  const end = new Promise((done) => { close = done })
  const rows = items.map((item) => el('tr', { data: { reference: item.reference } },
    el('th', { scope: 'row' }, item.format),
    el('td', {}, `~ ${size(item.size)}`),
    el('td', {}, t(item.fits ? 'fits' : 'fitsNot')),
    el('td', {}, el('span', { className: 'qt-verdict', data: { verdict: item.verdict }, title: item.verdict_text },
      t(`verdict_${item.verdict}`))),
    el('td', {}, item.on_disk ? t('onDisk') : ''),
    el('td', {}, el('button', {
      type: 'button', title: item.reference, aria: { label: `${t('take')}: ${item.format}` },
      on: { click: () => close(taken = item) }
    }, t('take')))))
  await dialog(t('variantsOf', { model }), [
    el('p', {}, t('variantsFor', { device, memory: memory ? size(memory) : '?' })),
    el('table', { className: 'qt-families qt-variants' }, el('tbody', {}, rows))
  ], [], { until: end })
  if (!taken) return
  const made = take(taken, node, items.find(({ kind }) => kind === 'base'))
  if (!taken.on_disk) await fetchAll([question(made)])
}
