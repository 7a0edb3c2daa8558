// What a node of this pack refers to, and which base it stands on.

/** The input that names a checkpoint, and the others that decide which files of it are meant, by node type. */
export const REFERRING = {
  QT_LoadBaseModel: { input: 'base_model', others: ['component', 'weights', 'revision'] },
  QT_LoadBaseTextEncoder: { input: 'base_model', others: ['revision'] },
  QT_LoadBaseVAE: { input: 'base_model', others: ['revision'] },
  QT_ApplyTransformerOverride: { input: 'override', others: ['weights_name', 'revision'] },
  QT_NunchakuSVDQLoader: { input: 'weights', others: ['precision', 'rank', 'weights_name', 'revision'] },
  QT_ModelSlimLoader: { input: 'folder', others: ['component', 'revision'] },
  QT_InspectCheckpoint: { input: 'checkpoint', others: ['weights_name'] }
}
const MUTED = 2
const BYPASSED = 4

export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)
const isLinked = (node, name) => node.inputs?.some((input) => input.name === name && input.link != null)

/** The reference that a node will load, or null where it comes in by a link and is not known before the run. */
export function referenceOf(node) {
  const { input } = REFERRING[node.type]
  if (isLinked(node, 'reference')) return null
  const free = String(widgetOf(node, 'reference')?.value ?? '').trim()
  if (free) return free
  return isLinked(node, input) ? null : String(widgetOf(node, input)?.value ?? '')
}

/** What `describe` is asked for a node, or null where its reference is not known. */
export function question(node) {
  const reference = referenceOf(node)
  if (!reference) return null
  const asked = { reference, node: node.type }
  for (const name of REFERRING[node.type].others) {
    const value = widgetOf(node, name)?.value
    if (value != null && value !== '' && !isLinked(node, name)) asked[name] = value
  }
  const base = node.type === 'QT_ApplyTransformerOverride' && baseOf(node)
  if (base) Object.assign(asked, { base: base.reference, base_component: base.component })
  return asked
}

/** {reference, component} of the Load Base Model that an override's `model` comes from, or null. */
export function baseOf(node) {
  const found = upstream(node, (other) => other.type === 'QT_LoadBaseModel')
  const reference = found && referenceOf(found)
  return reference ? { reference, component: widgetOf(found, 'component')?.value ?? 'transformer' } : null
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
function source(node, slot) {
  const graph = node.graph
  const id = node.inputs?.[slot]?.link
  const link = id == null ? null : graph?.getLink(id)
  if (!link) return null
  const origin = graph.getNodeById(link.origin_id)
  if (origin) return { node: origin, slot: link.origin_slot }
  const holder = graph.isRootGraph ? null : holderOf(graph)
  return holder ? source(holder, link.origin_slot) : null
}

/** The node that stands for a subgraph (the first of several: they share what is inside). */
function holderOf(subgraph) {
  const graphs = [subgraph.rootGraph, ...subgraph.rootGraph.subgraphs.values()]
  return graphs.flatMap((graph) => graph.nodes).find((node) => node.isSubgraphNode?.() && node.subgraph === subgraph)
}

/** {node, slot} of what leaves a subgraph by an output, or null. */
function inside(holder, slot) {
  const link = holder.subgraph.outputNode.slots[slot]?.getLinks()[0]
  if (!link) return null
  const origin = holder.subgraph.getNodeById(link.origin_id)
  return origin ? { node: origin, slot: link.origin_slot } : source(holder, link.origin_slot)
}
