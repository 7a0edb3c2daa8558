// Called in ComfyUI's page with {graph, title, description, category, drop, outside, widgets}: a saved workflow → a
// subgraph blueprint, by the frontend's own conversion. Nodes of the types `drop` go, those of `outside` stay out, and
// what was linked to them becomes an input or output. `widgets` are [node key, widget, label]; keys are node ids.
async ({ graph, title, description, category, drop, outside, widgets }) => {
  const settle = () => new Promise((done) => setTimeout(done, 400))
  await app.loadGraphData({ ...graph, id: crypto.randomUUID() })
  await settle()
  for (const node of [...app.graph.nodes]) if (drop.includes(node.type)) app.graph.remove(node)
  for (const group of [...app.graph.groups]) app.graph.remove(group)
  const inside = app.graph.nodes.filter((node) => !outside.includes(node.type))
  for (const node of inside) node.properties.qt_key = node.id
  const { node } = app.graph.convertToSubgraph(new Set(inside))
  node.title = node.subgraph.name = title
  await settle()
  const id = Object.fromEntries(node.subgraph.nodes.map((inner) => [inner.properties.qt_key, inner.id]))
  const proxies = widgets.map(([key, widget]) => {
    if (!(key in id)) throw new Error(`there is no node ${key}`)
    const inner = node.subgraph.getNodeById(id[key])
    if (!inner.widgets.some((w) => w.name === widget)) throw new Error(`${inner.type} has no widget ${widget}`)
    return [String(id[key]), widget]
  })
  for (const inner of node.subgraph.nodes) delete inner.properties.qt_key
  const pack = (saved, properties) => {
    const wrapper = saved.nodes.find((other) => other.type === node.subgraph.id)
    for (const input of wrapper.inputs ?? []) input.link = null
    for (const output of wrapper.outputs ?? []) output.links = []
    Object.assign(wrapper, { pos: [0, 0], order: 0, widgets_values: [], properties: { ...properties, cnr_id: 'quantized-transformers' } })
    const [subgraph] = saved.definitions.subgraphs
    Object.assign(subgraph, { category, description })
    return { revision: 0, last_node_id: saved.last_node_id, last_link_id: saved.last_link_id, nodes: [wrapper], links: [],
      version: 0.4, definitions: { subgraphs: [subgraph] }, extra: {} }
  }
  // once through a load, which makes inputs of the subgraph out of proxied widgets
  await app.loadGraphData(pack(app.graph.serialize(), { proxyWidgets: proxies }))
  await settle()
  return JSON.stringify(pack(app.graph.serialize(), {}))
}
