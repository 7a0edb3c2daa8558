// Which nodes carry a badge, and when they look again.

import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
import { Badge } from './badge.js'
import { downloads } from './downloads.js'
import { referring } from './known.js'
import { widgetOf } from './nodes.js'

const TYPING = 150 // milliseconds to wait while a name is being typed
const LOOKING = 500 // milliseconds between two looks at what changes without a word
const badges = new Set() // those of nodes in a graph
let timer = 0
let forced = false

/**
 * Look where no node is told: at a link or a bypass further up, and at a widget that a subgraph's node shows, which is
 * set without a call of the node inside and, in Vue nodes, without an event after it. A look compares a few values.
 */
export function listen() {
  api.addEventListener('graphChanged', () => refresh())
  downloads.addEventListener('change', () => refresh({ force: true }))
  setInterval(() => timer || refresh(), LOOKING)
}

/** Give a new node its badge, and look when its widgets or links change. Nodes of other packs are left alone. */
export function attach(node) {
  const refers = referring(node.comfyClass)
  if (!refers) return
  const badge = new Badge(node, lacking)
  for (const name of [refers.input, 'reference', ...refers.others]) {
    const widget = widgetOf(node, name)
    if (widget) after(widget, 'callback', () => refresh({ wait: widget.options?.values ? 0 : TYPING }))
  }
  after(node, 'onConnectionsChange', () => refresh())
  after(node, 'onAdded', () => {
    badges.add(badge)
    refresh()
  })
  after(node, 'onRemoved', () => leave(badge))
  if (node.graph) badges.add(badge)
}

/** Have every badge check whether its node refers to something else now; `force` asks the server in any case. */
export function refresh({ wait = 0, force = false } = {}) {
  forced ||= force
  clearTimeout(timer)
  timer = setTimeout(look, wait)
}

function look() {
  clearTimeout(timer)
  timer = 0
  for (const badge of badges) {
    if (isThere(badge.node)) badge.update(forced)
    else leave(badge)
  }
  forced = false
}

/** What the nodes of the open workflow ask for and do not have, each question once, when all badges have their answers. */
export async function lacking() {
  look()
  await Promise.all([...badges].map(({ settled }) => settled))
  const asked = [...badges].filter(({ node }) => isThere(node)).map(({ lacks }) => lacks).filter(Boolean)
  return [...new Map(asked.map((one) => [JSON.stringify(one), one])).values()]
}

/** Whether a node belongs to the graph that is open: those inside a subgraph that is gone are not told so. */
const isThere = ({ graph }) => graph?.isRootGraph || (graph && app.rootGraph.subgraphs.get(graph.id) === graph)

function leave(badge) {
  badges.delete(badge)
  badge.remove()
}

/** Call `then` after a callback of one object; nothing shared by others is touched. */
function after(object, name, then) {
  const original = object[name]
  object[name] = function (...given) {
    const answer = original?.apply(this, given)
    then()
    return answer
  }
}
