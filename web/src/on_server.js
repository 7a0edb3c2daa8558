// "Run on server" in a loader's menu: beside the graph come Server Model, with the same base and override, and the node
// that draws there, with what the graph samples. What is there already stays as it is.

import { app } from '../../../scripts/app.js'
import { failed } from './downloads.js'
import { t } from './i18n.js'
import { referring } from './known.js'
import { ahead } from './links.js'
import { referenceOf, upstream, valueOf, widgetOf } from './nodes.js'
import { set } from './place.js'
import { sampled } from './sampled.js'
import { call } from './server.js'

const GAP = 60
const WIDE = 400 // references are long
const SECOND = 'transformer_2'
const LISTS = { base_model: 'reference', override: 'override_reference' } // of Server Model, and what wins over them
const DRAWS = { image: ['QT_ServerImage', 'SaveImage'], video: ['QT_ServerVideo', 'SaveVideo'] }
const kindOf = (node) => referring(node.type)?.kind

/** What ComfyUI adds to a node's menu. Nothing is asked before it is chosen. */
export function menuItems(node) {
  if (!['base', 'override', 'svdq'].includes(kindOf(node))) return []
  return [{ content: t('runOnServer'), callback: () => { runOnServer(node).catch((error) => failed(error, t('runOnServer'))) } }]
}

/** Put a server beside the graph that draws what is sampled with the MODEL of a loader. */
export async function runOnServer(node) {
  const { first, second } = transformers(node)
  const base = (first ?? second).base
  const asked = {
    base: read(base), near: near(), override: read(first?.override), override_2: read(second?.override),
    kind: widget(first?.override, 'kind'), weights_name: widget(first?.override, 'weights_name'), revision: widget(base, 'revision')
  }
  if (Object.values(asked).includes(null)) throw new Error(t('linked'))
  const query = Object.fromEntries(Object.entries(asked).filter(([, value]) => value))
  const found = await call('serve', { query })
  place(node.graph, { ...asked, base: found.base }, found.makes, sampled(first, second, found, node.graph))
  app.extensionManager.toast.add({ severity: 'info', summary: t('runOnServer'), detail: t('onServer', found), life: 60000 })
}

/** The loaders of both transformers, {base, override} each; `second` is that of a base with two. */
function transformers(node) {
  const mine = loadersOf(node)
  const isSecond = (one) => Boolean(one.base) && valueOf(one.base, 'component') === SECOND
  const others = mine.base ? everyNode().filter((other) => kindOf(other) === 'base' && other !== mine.base).map(loadersOf)
    .filter((other) => isSecond(other) !== isSecond(mine) && referenceOf(other.base) === referenceOf(mine.base)) : []
  const other = others.length === 1 ? others[0] : null // else nothing tells which is meant
  return isSecond(mine) ? { first: other, second: mine } : { first: mine, second: other }
}

function loadersOf(node) {
  if (kindOf(node) !== 'base') return { base: upstream(node, (other) => kindOf(other) === 'base'), override: node }
  return { base: node, override: ahead(node, (other) => kindOf(other) === 'override', 'MODEL') }
}

const everyNode = () => [app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap(({ nodes }) => nodes)

/** A node's reference; '' without a node, null where it comes by a link. */
const read = (node) => node ? referenceOf(node) : ''

const widget = (node, name) => node ? valueOf(node, name) : ''

/** The one base of which this workflow loads text encoders. */
function near() {
  const found = new Set(everyNode().filter(({ type }) => type === 'QT_LoadBaseTextEncoder').map(referenceOf))
  return found.size === 1 ? [...found][0] ?? '' : ''
}

/** Add the nodes to the right of all that a graph has, as one step of undo. */
function place(graph, asked, makes, { values, picture }) {
  const { canvas } = app
  const right = Math.max(...graph.nodes.map(({ pos, size }) => pos[0] + size[0])) + GAP
  const top = Math.min(...graph.nodes.map(({ pos }) => pos[1]))
  const add = (type, x, y) => {
    const node = LiteGraph.createNode(type)
    node.pos = [x, y]
    graph.add(node)
    return node
  }
  canvas.emitBeforeChange()
  try {
    const server = add('QT_ServerModel', right, top)
    server.setSize([Math.max(server.size[0], WIDE), server.size[1]])
    choose(server, 'base_model', asked.base)
    choose(server, 'override', asked.override || 'none')
    for (const [name, value] of [['kind', asked.kind], ['weights_name', asked.weights_name], ['revision', asked.revision],
      [SECOND, asked.override_2]]) if (value) set(widgetOf(server, name), value)
    const [draws, saves] = DRAWS[makes]
    const drawing = add(draws, right + server.size[0] + GAP, top)
    for (const [name, value] of Object.entries(values)) set(widgetOf(drawing, name), value)
    const save = add(saves, drawing.pos[0] + drawing.size[0] + GAP, top)
    server.connect(0, drawing, slotOf(drawing, 'server_model'))
    drawing.connect(0, save, slotOf(save, makes === 'video' ? 'video' : 'images'))
    picture?.node.connect(picture.slot, drawing, slotOf(drawing, makes === 'video' ? 'start_image' : 'images'))
    canvas.selectItems([server, drawing, save])
    canvas.centerOnNode(drawing)
  } finally {
    canvas.emitAfterChange()
    canvas.setDirty(true, true)
  }
}

const slotOf = ({ inputs }, name) => inputs.findIndex((input) => input.name === name)

/** Set a reference: in its list where the list has it, else in the text that wins over the list. */
function choose(node, list, reference) {
  const chosen = widgetOf(node, list)
  const listed = chosen.options?.values?.includes?.(reference)
  set(listed ? chosen : widgetOf(node, LISTS[list]), reference)
}
