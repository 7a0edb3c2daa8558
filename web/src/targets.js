// Where downloads go and come from: settings, which the dialog shows, too.

export const TARGET = 'QuantizedTransformers.DownloadTo'
export const TARGETS = ['cache', 'models']
export const HUB = 'QuantizedTransformers.Hub'
export const HUBS = ['auto', 'huggingface', 'modelscope'] // auto: the one that the server's QT_HUB prefers
