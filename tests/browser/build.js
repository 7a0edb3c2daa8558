// Called in ComfyUI's page with {note, outside, inside, save, title, shown, slots, flat, versions} of a Workflow (graph.py):
// builds it with one subgraph of the columns `inside`, by the frontend's own conversion; `flat` leaves their one node as it
// is. Returns the graph and its prompt.
async ({ note, outside, inside, save, title, shown, slots, flat, versions }) => {
  const GAP = 20, TITLE = 30, BETWEEN = 40, NOTE = 420, LAST = 540, RESULT = 320
  const settle = () => new Promise((done) => setTimeout(done, 300))
  // a graph of its own: the frontend keeps widget values by graph and node id, and would hand them on
  await app.loadGraphData({ id: crypto.randomUUID(), revision: 0, last_node_id: 0, last_link_id: 0, nodes: [], links: [],
    groups: [], config: {}, extra: {}, version: 0.4 })
  const made = {}
  const create = ({ key, type, title, width, height, widgets = {}, models = [] }) => {
    const node = LiteGraph.createNode(type)
    if (!node) throw new Error(`there is no node ${type}`)
    app.graph.add(node)
    if (title) node.title = title
    const ours = type.startsWith('QT_') ? 'quantized-transformers' : 'comfy-core'
    if (type !== 'MarkdownNote') Object.assign(node.properties, { 'Node name for S&R': type, cnr_id: ours, ver: versions[ours] })
    if (models.length) node.properties.models = models
    for (const [name, value] of Object.entries(widgets)) {
      const widget = node.widgets.find((w) => w.name === name)
      if (!widget) throw new Error(`${type} has no widget ${name}`)
      const values = widget.options?.values
      if (Array.isArray(values) && !values.includes(value)) throw new Error(`${type}.${name} has no ${value}`)
      widget.value = value
    }
    node.setSize([width, Math.round(Math.max(height, node.computeSize()[1]))])
    return made[key] = node
  }
  /** Columns side by side; returns where the next begins, and how tall the tallest is. */
  const place = (columns, left) => {
    let tall = 0
    for (const nodes of columns) {
      let y = 0
      for (const node of nodes) {
        node.pos = [left, y + TITLE]
        y += TITLE + node.size[1] + GAP
      }
      tall = Math.max(tall, y - GAP)
      left += Math.max(0, ...nodes.map((node) => node.size[0])) + BETWEEN
    }
    return [left, tall]
  }
  const text = note && create({ key: '', type: 'MarkdownNote', title: 'Read me', width: NOTE, height: 0 })
  if (note) text.widgets[0].value = note
  const columns = outside.map((nodes) => nodes.map(create))
  const last = create(save)
  const [, high] = place(inside.map((nodes) => nodes.map(create)), 0)
  for (const spec of [...outside, ...inside, [save]].flat()) {
    const node = made[spec.key]
    for (const [name, [from, slot]] of Object.entries(spec.inputs)) {
      const input = node.inputs.findIndex((i) => i.name === name)
      if (input < 0) throw new Error(`${spec.type} has no input ${name}`)
      if (!made[from].connect(slot, node, input)) throw new Error(`${from} does not fit ${spec.key}.${name}`)
    }
  }
  await settle()

  const wrap = () => app.graph.convertToSubgraph(new Set(inside.flat().map(({ key }) => made[key]))).node
  const node = flat ? made[inside[0][0].key] : wrap()
  const { subgraph } = node
  await settle()
  if (!flat) node.title = subgraph.name = title
  // the frontend has made inputs out of some widgets
  for (const input of [...subgraph?.inputs ?? []]) if (input._widget) subgraph.removeInput(input)
  for (const [key, label] of Object.entries(slots)) {
    for (const id of made[key].outputs[0].links) {
      const link = app.graph.getLink(id)
      if (link.target_id === node.id) subgraph.renameInput(subgraph.inputs[link.target_slot], label)
    }
  }
  for (const { name, of } of shown) {
    const targets = of.map(([key, widget]) => {
      const inner = subgraph.getNodeById(made[key].id)
      const slot = inner?.inputs.find((input) => input.widget?.name === widget)
      if (!slot) throw new Error(`${key} has no widget ${widget}`)
      return [slot, inner]
    })
    const input = subgraph.addInput(name, String(targets[0][0].type))
    for (const [slot, inner] of targets) if (!input.connect(slot, inner)) throw new Error(`${name} does not fit ${inner.type}`)
  }
  await settle()
  const [left, tall] = place(columns, note ? NOTE + BETWEEN : 0)
  const prompts = (flat ? node.widgets : shown).filter(({ name }) => name.includes('prompt')).length
  const least = node.computeSize()[1]
  node.setSize([LAST, Math.round(least + 60 * prompts)])
  const whole = Math.max(tall, 760, flat ? node.size[1] + RESULT : 0)
  if (note) {
    text.pos = [0, TITLE]
    text.setSize([NOTE, whole - TITLE])
  }
  place([[node, last]], left)
  last.setSize([LAST, whole - last.pos[1]])
  await settle()
  // once through a load, so that opening and saving the file changes nothing more
  await app.loadGraphData((await app.graphToPrompt()).workflow)
  await settle()
  return JSON.stringify(await app.graphToPrompt()) // as a saved file: no undefined values
}
