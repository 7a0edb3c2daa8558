// What the server says of this pack's nodes and formats, asked once, before the first node is made.

import { call } from './server.js'

let known = { nodes: {}, colours: {} } // without an answer no node has a badge

/** Ask the server; never rejects. */
export async function loadKnown() {
  const answer = await call('page').catch(() => ({}))
  known = { ...known, ...answer }
}

/**
 * Of a node type that refers to a checkpoint: {input, others, kind}, the list that names it, the inputs that decide
 * which files of it are meant, and what the catalog calls it. Undefined for all others.
 */
export const referring = (type) => known.nodes[type]

/** The CSS colour of a format, as Inspect Checkpoint paints it. */
export const colour = (format) => known.colours[format] ?? known.colours['']
