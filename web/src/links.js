// Where what a node takes comes from, and where what it gives goes to: past reroutes and bypassed nodes, and into and out
// of subgraphs.

import { BYPASSED, holdersOf, inside, MUTED, source, valueOf } from './nodes.js'

const MOST = 1000 // steps; a graph may have a loop until it runs

/** {node, slot} of the output that the first linked input of these names has its value from, or null. */
export function from(node, ...names) {
  const slot = node?.inputs?.findIndex((input) => names.includes(input.name) && input.link != null) ?? -1
  return slot < 0 ? null : origin(node, slot)
}

/** The same for the first linked input of a type; of several, the one that is called like the output `slot`. */
function ofType(node, type, slot) {
  const linked = node.inputs?.filter((input) => input.type === type && input.link != null) ?? []
  const alike = linked.find(({ name }) => name === node.outputs?.[slot]?.name) ?? linked[0]
  return alike ? origin(node, node.inputs.indexOf(alike)) : null
}

/** {node, slot} of the outputs on the way of a type against the links, from the output `at` on. */
export function* chain(at, type) {
  for (let steps = 0; at && steps < MOST; steps++) {
    yield at
    at = ofType(at.node, type, at.slot)
  }
}

/** The value of a widget, or of the one of the node that its link comes from; undefined where neither is known. */
export function given(node, name) {
  if (!node) return undefined
  const value = valueOf(node, name)
  if (value !== null) return value
  const at = from(node, name)
  return (at && valueOf(at.node, 'value')) ?? undefined
}

/** The first node that `wanted` accepts on the way of outputs of these types along the links, the nearest first; or null. */
export function ahead(node, wanted, ...types) {
  const seen = new Set([node])
  for (const at of seen) { // grows meanwhile
    for (const [slot, output] of (at.outputs ?? []).entries()) {
      if (!types.includes(output.type) && output.type !== '*') continue
      for (const next of users(at, slot)) {
        if (next.mode === MUTED) continue
        if (next.mode !== BYPASSED && !seen.has(next) && wanted(next)) return next
        if (seen.size < MOST) seen.add(next)
      }
    }
  }
  return null
}

function origin(node, slot) {
  let at = source(node, slot)
  for (let steps = 0; at && steps < MOST; steps++) {
    const { node: one } = at
    const bypassed = one.mode === BYPASSED
    if (one.mode === MUTED) return null
    if (one.isSubgraphNode?.() && !bypassed) at = inside(one, at.slot)
    else if (bypassed || isReroute(one)) at = source(one, passes(one, at.slot))
    else return at
  }
  return null
}

const isReroute = ({ inputs, outputs }) => inputs?.length === 1 && outputs?.length === 1 && inputs[0].type === '*'

/** The input that a bypassed node hands on by an output. */
function passes({ inputs = [], outputs }, slot) {
  const alike = inputs.findIndex(({ type }) => type === outputs[slot]?.type)
  return alike < 0 ? 0 : alike
}

/** The nodes that an output goes to. */
function* users(node, slot) {
  const { graph } = node
  for (const id of node.outputs[slot].links ?? []) {
    const link = graph.getLink(id)
    if (link) yield* reached(graph, link)
  }
}

function* reached(graph, link) {
  const node = graph.getNodeById(link.target_id)
  if (!node) { // leaves a subgraph
    for (const holder of graph.isRootGraph ? [] : holdersOf(graph)) yield* users(holder, link.target_slot)
  } else if (node.isSubgraphNode?.() && node.mode !== BYPASSED) {
    for (const inner of node.subgraph.inputNode.slots[link.target_slot]?.getLinks() ?? []) yield* reached(node.subgraph, inner)
  } else yield node
}
