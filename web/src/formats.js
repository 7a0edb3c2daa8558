// Colours of the stored formats: those of Inspect Checkpoint's layer map (loaders/report.py).

const COLOURS = {
  BF16: '#8c929e', F16: '#8c929e', F32: '#8c929e', FP8: '#56b25c', NVFP4: '#3484cc', 'row shards': '#40a08c',
  'SVDQ INT4': '#d68c3c', 'SVDQ NVFP4': '#966ed6', 'SVDQuant parts': '#d68c3c', 'AWQ INT4': '#c85a8c',
  W8A8: '#466ec8', W8A8_DYNAMIC: '#5a96dc', W8A16: '#8cb4e1', W4A4_DYNAMIC: '#50aa5a', W4A8_DYNAMIC: '#82c36e',
  WFP8AFP8_DYNAMIC: '#e1a53c', W8A8_MXFP8: '#eb823c', W4A8_MXFP: '#be78c8', MXFP4: '#965abe', W4A4_MXFP4: '#965abe',
  W4A4_MXFP4_DUALSCALE: '#7346aa', 'ConvRot W4A4': '#3c966e', 'W4A8 (INT8)': '#78af5a', 'W6A8 (INT8)': '#78af5a',
  'AWQ W4A16': '#96be78', INT4: '#5fb969'
}

/** A CSS colour for a format; that of a problem for one that no report knows. */
export const colour = (format) => COLOURS[format] ?? '#d64541'
