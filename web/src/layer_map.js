// The layer map: rows are blocks, columns are modules, the colour is the stored format.

import { el } from './dom.js'
import { t } from './i18n.js'

/** A grid of a layer map {rows, columns, cells: [[format or null]], colours}, and the legend above it. */
export function layerMap({ rows, columns, cells, colours }) {
  const counts = new Map()
  for (const format of cells.flat()) if (format) counts.set(format, (counts.get(format) ?? 0) + 1)
  const legend = [...counts].map(([format, layers]) => el('span', { className: 'qt-key' },
    swatch(colours[format]), `${format} ${layers}`))
  const head = el('tr', {}, el('th', {}), columns.map((name) => el('th', { scope: 'col' }, el('span', {}, name))))
  const body = rows.map((row, i) => el('tr', {}, el('th', { scope: 'row' }, row), columns.map((column, j) => {
    const format = cells[i][j]
    const cell = el('td', { title: format ? `${row} ${column}: ${format}` : '' })
    if (format) cell.append(swatch(colours[format], `${column} ${format}`))
    return cell
  })))
  return el('figure', { className: 'qt-map' },
    el('figcaption', {}, legend.length ? legend : t('noLayers')),
    el('table', {},
      el('caption', { className: 'qt-hidden' }, t('layerMap')), el('thead', {}, head), el('tbody', {}, body)))
}

function swatch(colour, label) {
  const square = el('i', { className: 'qt-swatch', ...(label && { role: 'img', aria: { label: label } }) })
  square.style.background = colour
  return square
}
