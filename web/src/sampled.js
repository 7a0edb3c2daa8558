// What a graph samples with a MODEL, as the widgets of Server Image and Server Video have it. What cannot be followed
// through the graph is left out, and keeps the node's default.

import { ahead, chain, from, given } from './links.js'

const TEXTS = ['text', 'prompt', 't5xxl']
const has = (node, name) => node.inputs?.some((input) => input.name === name)
const isSampler = (node) => has(node, 'latent_image') && (has(node, 'positive') || has(node, 'guider'))
const isNumber = (value) => typeof value === 'number' && Number.isFinite(value)

/**
 * {values {widget: value}, picture {node, slot} | null} for the loaders of one transformer, or of two; `found` is what the
 * server says of the model. The picture is the output in `graph` of a picture that the prompt has with it.
 */
export function sampled(first, second, found, graph) {
  const [high, low] = [first, second].map((one) => one && samplerOf(one.override ?? one.base))
  const sampler = high ?? low
  if (!sampler) return { values: {}, picture: null }
  const guider = from(sampler, 'guider')?.node ?? sampler
  const wanted = asked(from(guider, 'positive', 'conditioning'))
  const unwanted = asked(from(guider, 'negative'))
  const cfg = cfgOf(sampler)
  const values = {
    prompt: wanted.text, negative_prompt: cfg > 1 ? unwanted.text : '', ...sizeOf(sampler),
    steps: given(sampler, 'steps') ?? given(from(sampler, 'sigmas')?.node, 'steps'),
    seed: given(sampler, 'seed') ?? given(sampler, 'noise_seed') ?? given(from(sampler, 'noise')?.node, 'noise_seed'),
    ...guidance(cfg, wanted.guidance, found.distilled)
  }
  if (found.makes === 'video') {
    values.fps = Math.round(given(ahead(sampler, (node) => isNumber(given(node, 'fps')), 'LATENT', 'IMAGE', 'VIDEO'), 'fps'))
    if (high && low && low !== high) values.cfg_2 = cfgOf(low)
  }
  const usable = Object.entries(values).filter(([, value]) => typeof value === 'string' || isNumber(value))
  return { values: Object.fromEntries(usable), picture: pictureOf(wanted.nodes, graph) }
}

const samplerOf = (loader) => ahead(loader, isSampler, 'MODEL', 'GUIDER')

const cfgOf = (sampler) => given(sampler, 'cfg') ?? given(from(sampler, 'guider')?.node, 'cfg') ?? 1 // BasicGuider's

/** Distilled guidance is a model's input in ComfyUI, too; beside it, cfg is a second evaluation. */
function guidance(cfg, distilled, isDistilled) {
  if (!isNumber(distilled) && !isDistilled) return { cfg }
  return { cfg: distilled, true_cfg: cfg > 1 ? cfg : undefined }
}

/** {text, guidance, nodes}: what the nodes on the way of a conditioning say. */
function asked(conditioning) {
  const found = { nodes: [] }
  for (const { node } of chain(conditioning, 'CONDITIONING')) {
    found.nodes.push(node)
    found.guidance ??= given(node, 'guidance')
    if (node.type === 'ConditioningZeroOut') found.text ??= ''
    found.text ??= TEXTS.map((name) => given(node, name)).find((value) => typeof value === 'string')
  }
  return found
}

/** Width, height and, of a video, length of the latent that sampling begins with. */
function sizeOf(sampler) {
  for (const { node } of chain(from(sampler, 'latent_image'), 'LATENT')) {
    const [width, height, length] = ['width', 'height', 'length'].map((name) => given(node, name))
    if (isNumber(width) && isNumber(height)) return { width, height, length }
  }
  return {}
}

/** The output in `graph` that the first picture comes from which one of these nodes takes. */
function pictureOf(nodes, graph) {
  for (const node of nodes) {
    const input = node.inputs?.find(({ type, link }) => type === 'IMAGE' && link != null)
    for (const at of input ? chain(from(node, input.name), 'IMAGE') : []) if (at.node.graph === graph) return at
  }
  return null
}
