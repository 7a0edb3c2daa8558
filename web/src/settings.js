// Settings: what new nodes start with. Workflows keep what they were saved with.

import { app } from '../../../scripts/app.js'
import { el } from './dom.js'
import { OFFER } from './missing.js'
import { widgetOf } from './nodes.js'
import { call } from './server.js'
import { HUB, HUBS, TARGET, TARGETS } from './targets.js'

const CATEGORY = 'Quantized Transformers'

/** Which widget a setting gives its value to, by node type. */
const DEFAULTS = [
  {
    id: 'QuantizedTransformers.Compute', widget: 'compute', name: 'Matmul of new loader nodes',
    options: ['auto', 'native', 'dequantize'],
    tooltip: 'The compute input of new Apply Transformer Override and ModelSlim Loader nodes.',
    nodes: ['QT_ApplyTransformerOverride', 'QT_ModelSlimLoader']
  },
  {
    id: 'QuantizedTransformers.SVDQBackend', widget: 'backend', name: 'Nunchaku backend of new nodes',
    options: ['auto', 'comfy_kitchen', 'nunchaku', 'dequantize'],
    tooltip: 'The backend input of new Nunchaku SVDQ Loader nodes.',
    nodes: ['QT_NunchakuSVDQLoader']
  },
  {
    id: 'QuantizedTransformers.FP4Backend', widget: 'fp4_backend', name: 'FP4 backend of new nodes',
    options: ['auto', 'comfy_kitchen', 'flashinfer_cudnn', 'flashinfer_cutlass', 'flashinfer_trtllm'],
    tooltip: 'The fp4_backend input of new Apply Transformer Override nodes.', nodes: ['QT_ApplyTransformerOverride']
  }
]

export const settings = [
  ...DEFAULTS.map(({ id, name, options, tooltip }) => ({
    id, name, options, tooltip, type: 'combo', defaultValue: 'auto', category: [CATEGORY, 'Defaults', name]
  })),
  {
    id: OFFER, name: 'Offer downloads when a workflow opens', type: 'boolean', defaultValue: true,
    tooltip: 'Asks the Hub for the sizes of what a workflow lacks, and shows one dialog to download it.',
    category: [CATEGORY, 'Downloads', 'Offer downloads when a workflow opens']
  },
  {
    id: TARGET, name: 'Download to', type: 'combo', options: TARGETS, defaultValue: TARGETS[0],
    tooltip: "cache: the Hugging Face cache, which other tools share. models: ComfyUI's model folders, as owner/name.",
    category: [CATEGORY, 'Downloads', 'Download to']
  },
  {
    id: HUB, name: 'Preferred hub', type: 'combo', options: HUBS, defaultValue: HUBS[0],
    tooltip: "Where repos that name no hub are downloaded from. auto: what the server's QT_HUB says, else Hugging Face.",
    category: [CATEGORY, 'Downloads', 'Preferred hub']
  },
  {
    id: 'QuantizedTransformers.DownloadFolder', name: 'Hugging Face cache',
    tooltip: 'Where it is on the server. HF_HOME or HF_HUB_CACHE moves it, set before ComfyUI starts.',
    defaultValue: '', category: [CATEGORY, 'Downloads', 'Hugging Face cache'], type: downloadFolder
  }
]

/** The folder as text: it is the server's to choose, before it starts. */
function downloadFolder() {
  const shown = el('code', { className: 'qt-folder' }, '…')
  const say = (text) => { shown.textContent = text }
  call('device').then((found) => say(found['download folder']), (error) => say(error.message))
  return shown
}

/** Give a new node what the settings say; a node of a saved workflow gets its own values right after this. */
export function applyDefaults(node) {
  for (const { id, widget, nodes, options } of DEFAULTS) {
    const value = nodes.includes(node.comfyClass) ? app.extensionManager.setting.get(id) : 'auto'
    const target = value !== 'auto' && options.includes(value) && widgetOf(node, widget)
    if (target) target.value = value
  }
}
