// The commands: what this machine can do, and workflows of other packs made into ones of this pack.

import { app } from '../../../scripts/app.js'
import { dialog, facts, list } from './dialog.js'
import { el } from './dom.js'
import { t } from './i18n.js'
import { before, downloadMissing, offerMissing } from './missing.js'
import { call } from './server.js'

/** The commands as ComfyUI wants them; locales/<language>/commands.json translates them. */
export const commands = [
  {
    id: 'QuantizedTransformers.Doctor', label: 'Quantized Transformers: doctor', menubarLabel: 'Doctor',
    icon: 'pi pi-heart', function: doctor
  },
  {
    id: 'QuantizedTransformers.Convert', label: 'Quantized Transformers: convert this workflow',
    menubarLabel: 'Convert this workflow', icon: 'pi pi-sync', function: convertWorkflow
  },
  {
    id: 'QuantizedTransformers.Download', label: 'Quantized Transformers: download what is missing',
    menubarLabel: 'Download what is missing', icon: 'pi pi-download', function: downloadMissing
  }
]

/** Show what the server knows of its device, its packages, and what each format does there. */
export async function doctor() {
  await guarded(t('doctor'), async () => {
    const found = await call('device')
    const { families, ...rest } = found
    const rows = families.map(({ family, verdict, text }) => el('tr', {},
      el('th', { scope: 'row' }, family),
      el('td', {}, el('span', { className: 'qt-verdict', data: { verdict } }, t(`verdict_${verdict}`))),
      el('td', {}, text)))
    await dialog(t('doctor'), [
      el('table', { className: 'qt-families' }, el('tbody', {}, rows)),
      facts(Object.entries(rest).map(([name, value]) => [named(name), tree(value)]))
    ])
  })
}

/** What a fact is called: a package's name is the same in every language. */
function named(name) {
  const key = `fact_${name}`
  return t(key) === key ? name : t(key)
}

/** A fact as text, or as a list of its parts. */
function tree(value) {
  if (Array.isArray(value)) return list(value)
  if (value && typeof value === 'object') return facts(Object.entries(value))
  return value || t('none')
}

/** Have the server replace other packs' loaders; what comes back opens as a workflow of its own. */
export async function convertWorkflow() {
  await guarded(t('convert'), async () => {
    const answer = await call('migrate', { method: 'POST', body: app.rootGraph.serialize() })
    await before(async () => {
      if (answer.changes.length) {
        const name = app.extensionManager.workflow.activeWorkflow?.filename ?? 'workflow'
        await app.loadGraphData(answer.workflow, true, true, `${name} (Quantized Transformers)`)
      }
      await dialog(t('convert'), [
        el('p', {}, t(answer.changes.length ? 'converted' : 'nothingToConvert')), list(answer.changes),
        answer.left.length > 0 && el('p', {}, t('left')), list(answer.left)
      ])
    })
    if (answer.changes.length) await offerMissing()
  })
}

async function guarded(title, action) {
  try {
    await action()
  } catch (error) {
    await dialog(title, el('pre', {}, error.full ?? error.message))
  }
}
