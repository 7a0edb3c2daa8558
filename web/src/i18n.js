// Texts of locales/<language>/main.json, which the host serves under /i18n.

import { app } from '../../../scripts/app.js'
import { api } from '../../../scripts/api.js'

let english = {}
let local = {}

/** The language that the user has chosen. */
export const language = () => app.extensionManager.setting.get('Comfy.Locale') ?? 'en'

/** Read the texts once, for the language that the user has chosen. */
export async function loadTexts() {
  const all = await api.getCustomNodesI18n()
  english = all.en?.quantizedTransformers ?? {}
  local = all[language()]?.quantizedTransformers ?? {}
}

/** The text of a key with [name] replaced by values.name; the key itself where there is none. */
export function t(key, values = {}) {
  const text = local[key] ?? english[key] ?? key
  return text.replace(/\[(\w+)\]/g, (all, name) => values[name] ?? all)
}
