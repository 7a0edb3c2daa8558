// What a node of this pack refers to, and which base it stands on.

import { referring } from './known.js'

export const MUTED = 2
export const BYPASSED = 4

export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)

/**
 * What an input of a node will be when the workflow runs: its widget's value, undefined without a widget, null where it
 * comes in by a link. Inside a subgraph a widget that the subgraph's node shows too is only linked to that one, which
 * has the value; null where several nodes of one subgraph differ.
 */
export function valueOf(node, name) {
  const id = node.inputs?.find((input) => input.name === name)?.link
  if (id == null) return widgetOf(node, name)?.value
  const link = node.graph?.getLink(id)
  if (!link || node.graph.getNodeById(link.origin_id)) return null
  const [value, ...others] = holdersOf(node.graph).map((holder) => valueOf(holder, holder.inputs[link.origin_slot]?.name))
  return others.every((other) => other === value) ? value : null
}

/** The reference that a node will load, or null where it comes in by a link and is not known before the run. */
export function referenceOf(node, { input } = referring(node.type)) {
  const free = valueOf(node, 'reference')
  if (free === null) return null
  const chosen = String(free ?? '').trim() || valueOf(node, input)
  return chosen === null ? null : String(chosen ?? '')
}

/** What `describe` is asked for a node, or null where its reference is not known. */
export function question(node) {
  const reference = referenceOf(node)
  if (!reference) return null
  const { others, kind } = referring(node.type)
  const asked = { reference, node: node.type }
  for (const name of others) {
    const value = valueOf(node, name)
    if (value != null && value !== '') asked[name] = value
  }
  const base = kind === 'override' && baseOf(node)
  if (base) Object.assign(asked, { base: base.reference, base_component: base.component })
  return asked
}

/** {reference, component} of the node for bases that an override's `model` comes from, or null. */
export function baseOf(node) {
  const found = upstream(node, (other) => referring(other.type)?.kind === 'base')
  const reference = found && referenceOf(found)
  return reference ? { reference, component: valueOf(found, 'component') ?? 'transformer' } : null
}

/**
 * The first node that `wanted` accepts on the way of a MODEL against the links: through reroutes, bypassed nodes,
 * whatever passes a MODEL on, and into and out of subgraphs.
 */
export function upstream(node, wanted) {
  const seen = new Set()
  let at = source(node, modelInput(node))
  while (at && !seen.has(`${at.node.graph?.id} ${at.node.id} ${at.slot}`)) {
    seen.add(`${at.node.graph?.id} ${at.node.id} ${at.slot}`)
    if (at.node.mode === MUTED) return null
    const passes = at.node.mode === BYPASSED
    if (!passes && wanted(at.node)) return at.node
    at = at.node.isSubgraphNode?.() && !passes ? inside(at.node, at.slot) : source(at.node, modelInput(at.node))
  }
  return null
}

/** The slot of a node's MODEL input; a reroute's only input has any type. */
const modelInput = ({ inputs = [] }) => inputs
  .findIndex(({ type }) => type === 'MODEL' || (type === '*' && inputs.length === 1))

/** {node, slot} of the output that an input hangs on, or null. */
export function source(node, slot) {
  const graph = node.graph
  const id = node.inputs?.[slot]?.link
  const link = id == null ? null : graph?.getLink(id)
  if (!link) return null
  const origin = graph.getNodeById(link.origin_id)
  if (origin) return { node: origin, slot: link.origin_slot }
  const [holder] = holdersOf(graph) // of several the first: they share what is inside
  return holder ? source(holder, link.origin_slot) : null
}

/** The nodes that stand for a subgraph; none for the whole graph. */
export function holdersOf(subgraph) {
  const graphs = [subgraph.rootGraph, ...subgraph.rootGraph.subgraphs.values()]
  return graphs.flatMap((graph) => graph.nodes).filter((node) => node.isSubgraphNode?.() && node.subgraph === subgraph)
}

/** {node, slot} of what leaves a subgraph by an output, or null. */
export function inside(holder, slot) {
  const link = holder.subgraph.outputNode.slots[slot]?.getLinks()[0]
  if (!link) return null
  const origin = holder.subgraph.getNodeById(link.origin_id)
  return origin ? { node: origin, slot: link.origin_slot } : source(holder, link.origin_slot)
}
