// Where downloads go: the setting, which the dialog shows, too.

export const TARGET = 'QuantizedTransformers.DownloadTo'
export const TARGETS = ['cache', 'models']
