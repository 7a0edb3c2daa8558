// Put a checkpoint of the catalog into the graph: the right node, its widget set, wired to what is selected.

import { app } from '../../../scripts/app.js'
import { referenceOf, widgetOf } from './nodes.js'

const GAP = 40

/** Create the node of a catalog item at `position` (canvas coordinates), or beside what is selected; returns it. */
export function place(item, position) {
  const { canvas } = app
  const graph = canvas.graph
  const selected = Object.values(canvas.selected_nodes ?? {})
  canvas.emitBeforeChange() // one step of undo
  try {
    const under = position && graph.getNodeOnPos(...position)
    if (under?.type === item.node) {
      refer(under, item)
      return under
    }
    const node = LiteGraph.createNode(item.node)
    node.pos = position ?? beside(selected.at(-1), node)
    graph.add(node)
    refer(node, item)
    selected.find((other) => wire(node, other))
    canvas.selectNode(node)
    return node
  } finally {
    canvas.emitAfterChange()
    canvas.setDirty(true, true)
  }
}

/** Set what a node refers to: in its list where the list has it, else in `reference`; and other widgets of an item. */
export function refer(node, item) {
  const { input, reference, values } = item
  if (values) {
    for (const [name, value] of Object.entries({ weights_name: '', ...values })) set(widgetOf(node, name), value)
  }
  const chosen = widgetOf(node, input)
  const listed = chosen?.options?.values?.includes?.(reference)
  set(widgetOf(node, 'reference'), listed ? '' : reference)
  if (listed) set(chosen, reference)
  if (referenceOf(node, item) !== reference) set(widgetOf(node, 'reference'), reference) // a link decides about the list
}

export function set(widget, value) {
  if (!widget || widget.value === value) return
  widget.value = value
  widget.callback?.(value)
}

/** Connect the MODEL of one to the free MODEL input of the other; whether there was something to connect. */
function wire(node, other) {
  const output = ({ outputs }) => outputs?.findIndex(({ type }) => type === 'MODEL') ?? -1
  const input = ({ inputs }) => inputs?.findIndex(({ type, link }) => type === 'MODEL' && link == null) ?? -1
  if (input(node) >= 0 && output(other) >= 0) return Boolean(other.connect(output(other), node, input(node)))
  if (output(node) >= 0 && input(other) >= 0) return Boolean(node.connect(output(node), other, input(other)))
  return false
}

/** To the right of a node, or in the middle of what is visible. */
export function beside(other, node) {
  if (other) return [other.pos[0] + other.size[0] + GAP, other.pos[1]]
  const [x, y, width, height] = app.canvas.visible_area
  return [x + (width - node.size[0]) / 2, y + (height - node.size[1]) / 2]
}
