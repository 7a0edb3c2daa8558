// Put one form of a model into the graph in the place of another: a base alone, a base with an override behind it, or a
// loader that needs no base. Whatever hung on the old MODEL hangs on the new one.

import { app } from '../../../scripts/app.js'
import { referring } from './known.js'
import { upstream, widgetOf } from './nodes.js'
import { beside, place, refer, set } from './place.js'

const DEFER = 'defer to override'
const kindOf = (node) => node && referring(node.type)?.kind

/** Take `item` in the place of what `node` loads, or anew without one: the node that loads it now. */
export function take(item, node, base) {
  if (!node) return place(item)
  const { canvas } = app
  canvas.emitBeforeChange() // one step of undo
  try {
    const tail = behind(node)
    const head = baseOf(tail)
    if (item.kind === 'base') return alone(item, tail, head)
    if (item.kind === 'override') return onBase(item, tail, head, base)
    return single(item, tail, head)
  } finally {
    canvas.emitAfterChange()
    canvas.setDirty(true, true)
  }
}

/** The override that stands on a base, where there is one; else the node itself. */
function behind(node) {
  if (kindOf(node) !== 'base') return node
  return targets(node).map(({ node: other }) => other).find((other) => kindOf(other) === 'override') ?? node
}

/** The base that a node is, or stands on; null for a loader that needs none. */
function baseOf(node) {
  if (kindOf(node) === 'base') return node
  return kindOf(node) === 'override' ? upstream(node, (other) => kindOf(other) === 'base') : null
}

function alone(item, tail, head) {
  const made = head ?? add(item.node, tail)
  refer(made, item)
  set(widgetOf(made, 'weights'), 'load')
  if (made !== tail) replace(tail, made)
  return made
}

function onBase(item, tail, head, base) {
  const below = head ?? add(base.node, tail, -1)
  if (!head) refer(below, base)
  set(widgetOf(below, 'weights'), DEFER)
  const made = tail.type === item.node ? tail : add(item.node, tail, tail === below ? 1 : 0)
  refer(made, item)
  if (made === tail) return made
  if (tail === below) move(tail, made)
  else replace(tail, made)
  below.connect(model(below), made, made.inputs.findIndex(({ type }) => type === 'MODEL'))
  return made
}

function single(item, tail, head) {
  const made = tail.type === item.node ? tail : add(item.node, tail)
  refer(made, item)
  if (made !== tail) replace(tail, made)
  if (head && head !== tail && !targets(head).length) head.graph.remove(head)
  return made
}

/** A new node in the place of another, or `columns` beside it. */
function add(type, old, columns = 0) {
  const node = LiteGraph.createNode(type)
  node.pos = columns > 0 ? beside(old, node) : [old.pos[0] + columns * (old.size[0] + 40), old.pos[1]]
  old.graph.add(node)
  return node
}

/** Hang what hangs on a node's MODEL on that of another. */
function move(old, made) {
  for (const { node, slot } of targets(old)) if (node !== made) made.connect(model(made), node, slot)
}

function replace(old, made) {
  move(old, made)
  old.graph.remove(old)
}

const model = ({ outputs }) => outputs.findIndex(({ type }) => type === 'MODEL')

/** {node, slot} of every input that a node's MODEL goes to; a subgraph's output is one of its output node's. */
function targets(node) {
  const { graph, outputs } = node
  return (outputs[model(node)]?.links ?? []).map((id) => graph.getLink(id))
    .map((link) => ({ node: graph.getNodeById(link.target_id) ?? graph.outputNode, slot: link.target_slot }))
    .filter(({ node: other }) => other)
}
