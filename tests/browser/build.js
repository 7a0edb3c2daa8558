// Called in ComfyUI's page with {note, columns: [[[group title, [node]]]], versions}. Returns graphToPrompt() as text.
async ({ note, columns, versions }) => {
  const GAP = 26, TITLE = 30, GROUP = 44, TOP = 60
  // a graph of its own: the frontend keeps widget values by graph and node id, and would hand them on
  await app.loadGraphData({ id: crypto.randomUUID(), revision: 0, last_node_id: 0, last_link_id: 0, nodes: [], links: [],
    groups: [], config: {}, extra: {}, version: 0.4 })
  const made = {}
  const create = (type, title, width, height) => {
    const node = LiteGraph.createNode(type)
    if (!node) throw new Error(`there is no node ${type}`)
    app.graph.add(node)
    if (title) node.title = title
    const ours = type.startsWith('QT_') ? 'quantized-transformers' : 'comfy-core'
    if (type !== 'MarkdownNote') Object.assign(node.properties, { 'Node name for S&R': type, cnr_id: ours, ver: versions[ours] })
    const least = node.computeSize()
    node.setSize([Math.round(Math.max(width, least[0] > 460 ? 460 : 0)), Math.round(Math.max(height, least[1]))])
    return node
  }
  const text = create('MarkdownNote', 'Read me', 460, 640)
  text.pos = [0, 0]
  text.widgets[0].value = note
  let x = 460 + 60
  for (const column of columns) {
    let y = 0, widest = 0
    for (const [title, nodes] of column) {
      const top = y
      y += TOP
      let width = 0
      for (const spec of nodes) {
        const node = made[spec.key] = create(spec.type, spec.title, spec.width, spec.height)
        if (spec.models.length) node.properties.models = spec.models
        for (const [name, value] of Object.entries(spec.widgets)) {
          const widget = node.widgets.find((w) => w.name === name)
          if (!widget) throw new Error(`${spec.type} has no widget ${name}`)
          const values = widget.options?.values
          if (Array.isArray(values) && !values.includes(value)) throw new Error(`${spec.type}.${name} has no ${value}`)
          widget.value = value
        }
        node.pos = [x + 14, y + TITLE]
        y += TITLE + node.size[1] + GAP
        width = Math.max(width, node.size[0])
      }
      const group = new LiteGraph.LGraphGroup(title)
      group.pos = [x, top]
      group.size = [width + 28, y - top]
      group.font_size = 24
      app.graph.add(group)
      widest = Math.max(widest, width + 28)
      y += GROUP
    }
    x += widest + 60
  }
  for (const column of columns) for (const [, nodes] of column) for (const spec of nodes) {
    const node = made[spec.key]
    for (const [name, [from, slot]] of Object.entries(spec.inputs)) {
      const input = node.inputs.findIndex((i) => i.name === name)
      if (input < 0) throw new Error(`${spec.type} has no input ${name}`)
      if (!made[from].connect(slot, node, input)) throw new Error(`${from} does not fit ${spec.key}.${name}`)
    }
  }
  await new Promise((done) => setTimeout(done, 300))
  // once through a load, so that opening and saving the file changes nothing more
  await app.loadGraphData((await app.graphToPrompt()).workflow)
  await new Promise((done) => setTimeout(done, 300))
  return JSON.stringify(await app.graphToPrompt()) // as a saved file: no undefined values
}
