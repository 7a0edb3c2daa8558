// The pack's part of ComfyUI's frontend. It only makes pleasant what the nodes and routes can do: without it every
// workflow still opens and runs. The modules of src/ have no effect when they are imported, since the frontend imports
// every .js file of a pack by itself. (They are not .mjs: the host lets a browser cache those, and would mix versions.)

import { app } from '../../scripts/app.js'
import { attach, listen, refresh } from './src/badges.js'
import { sidebarTab } from './src/browser.js'
import { commands } from './src/commands.js'
import { loadTexts } from './src/i18n.js'
import { loadKnown } from './src/known.js'
import { offerMissing } from './src/missing.js'
import { menuItems } from './src/on_server.js'
import { speak } from './src/server.js'
import { applyDefaults, settings } from './src/settings.js'

const style = new CSSStyleSheet()
document.adoptedStyleSheets.push(style)
fetch(new URL('quantized_transformers.css', import.meta.url)).then((answer) => answer.text()).then((text) => style.replace(text))

app.registerExtension({
  name: 'quantizedtransformers.checkpoints',
  settings,
  commands,
  menuCommands: [{ path: ['Extensions', 'Quantized Transformers'], commands: commands.map(({ id }) => id) }],
  aboutPageBadges: [{
    label: 'Quantized Transformers',
    url: 'https://github.com/quantized-transformers/quantized-transformers',
    icon: 'pi pi-microchip'
  }],
  init: () => Promise.all([loadTexts(), loadKnown()]),
  setup() {
    listen()
    speak()
    app.extensionManager.registerSidebarTab(sidebarTab())
  },
  getNodeMenuItems: menuItems,
  nodeCreated(node) {
    applyDefaults(node)
    attach(node)
  },
  afterConfigureGraph() {
    refresh()
    offerMissing() // nobody waits for it
  },
  // "Refresh node definitions": files may have come and gone
  refreshComboInNodes: () => refresh({ force: true })
})
