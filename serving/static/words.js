// The words in English and Chinese. Elements name theirs: data-t (text), data-t-label (label and
// hint), data-t-placeholder.

const WORDS = {
  chat: ["Chat", "对话"],
  complete: ["Complete", "续写"],
  classify: ["Classify", "分类"],
  runs: ["Runs", "训练记录"],
  model: ["Model", "模型"],
  settings: ["Settings", "设置"],
  theme: ["Theme: system, light, dark", "主题：跟随系统、浅色、深色"],
  themeIs: ["Theme: {name}", "主题：{name}"],
  system: ["system", "跟随系统"],
  light: ["light", "浅色"],
  dark: ["dark", "深色"],
  language: ["中文", "English"],
  menu: ["Conversations", "对话列表"],
  close: ["Close", "关闭"],
  cancel: ["Cancel", "取消"],
  skip: ["Skip to the text field", "跳到输入框"],

  newChat: ["New conversation", "新对话"],
  rename: ["Rename", "重命名"],
  remove: ["Delete", "删除"],
  removed: ["Deleted.", "已删除。"],
  undo: ["Undo", "撤销"],
  nothingKept: ["Conversations stay in this browser.", "对话只保存在本浏览器中。"],
  log: ["Conversation", "对话内容"],
  you: ["You", "你"],
  answer: ["Answer", "回答"],
  message: ["Message", "消息"],
  messageHere: ["Say something…", "说点什么……"],
  send: ["Send", "发送"],
  stop: ["Stop", "停止"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  edit: ["Edit and send again", "编辑并重新发送"],
  editing: [
    "Editing an earlier message: what follows it will be replaced.",
    "正在编辑之前的消息：其后的内容将被替换。",
  ],
  again: ["Answer again", "重新回答"],
  earlier: ["Earlier answer", "上一个回答"],
  later: ["Later answer", "下一个回答"],
  chatHint: ["Enter sends, Shift+Enter makes a new line, Esc stops", "Enter 发送，Shift+Enter 换行，Esc 停止"],
  chatEmpty: ["Talk to {model}", "与 {model} 对话"],
  chatUntaught: [
    "This model was never taught to reply: it continues a dialogue as it may have read some.",
    "这个模型没有学过回答：它只会像读过的文本那样接着写对话。",
  ],
  forgotten: ["The model no longer sees what is above.", "模型已看不到以上内容。"],
  writing: ["The model is writing.", "模型正在写。"],
  thinking: ["Reading…", "阅读中……"],
  done: ["The answer is complete.", "回答完毕。"],
  stopped: ["stopped", "已停止"],
  cutLength: ["cut at the token limit", "达到词元上限"],
  nothingSaid: ["(no text)", "（没有文字）"],
  tokens: ["{n} tokens", "{n} 个词元"],
  perSecond: ["{n} tokens/s", "{n} 词元/秒"],
  first: ["first after {n} s", "首个词元 {n} 秒"],
  context: ["{n} of {most} tokens", "{n} / {most} 个词元"],

  text: ["Text", "文本"],
  textHere: ["Write the beginning; the model goes on.", "写个开头，模型会接着写。"],
  go: ["Continue", "续写"],
  retry: ["Again", "重来"],
  clear: ["Clear", "清空"],
  score: ["Probabilities of the text", "文本的概率"],
  completeHint: ["Ctrl+Enter continues, Esc stops; point at a token for what else it could be", "Ctrl+Enter 续写，Esc 停止；指向词元可看其他可能"],
  candidates: ["Likeliest here", "此处最可能的词元"],
  take: ["Go on with {token} instead", "改用 {token} 继续"],

  classifyHere: ["A text to classify", "要分类的文本"],
  classifyGo: ["Classify", "分类"],
  classifyHint: ["Ctrl+Enter classifies; it also happens while you write.", "Ctrl+Enter 分类；输入时也会自动进行。"],
  labels: ["Labels", "标签"],
  labelIs: ["{label}, {percent}", "{label}，{percent}"],
  took: ["{n} ms", "{n} 毫秒"],

  sampling: ["Sampling", "采样"],
  systemPrompt: ["System prompt of this conversation", "本对话的系统提示"],
  reset: ["Reset", "恢复默认"],
  temperature: ["Temperature", "温度"],
  temperatureHint: ["0 takes the likeliest token", "0 总取最可能的词元"],
  top_p: ["Top-p", "Top-p"],
  top_k: ["Top-k", "Top-k"],
  min_p: ["Min-p", "Min-p"],
  max_tokens: ["Most tokens", "最多词元"],
  off: ["{n} is off", "{n} 为关闭"],
  max_tokensHint: ["of an answer", "每个回答"],
  presence_penalty: ["Presence penalty", "存在惩罚"],
  frequency_penalty: ["Frequency penalty", "频率惩罚"],
  repetition_penalty: ["Repetition penalty", "重复惩罚"],
  stopStrings: ["Stop at, one per line", "遇到即停，每行一个"],
  seed: ["Seed", "种子"],
  seedHint: ["empty: another every time", "留空则每次不同"],
  forgetKey: ["Forget the API key", "忘记 API 密钥"],

  keyTitle: ["This server asks for an API key", "此服务器需要 API 密钥"],
  keyWrong: ["That key is not one of this server's.", "该密钥不正确。"],
  keyKept: ["It is kept until this tab is closed.", "仅在此标签页关闭前保留。"],
  key: ["API key", "API 密钥"],
  keyGo: ["Continue", "继续"],
  keyNone: ["No key was given.", "未提供密钥。"],

  chooseModel: ["{model} was asked for; choose one above.", "请求的是 {model}，请在上方另选一个。"],
  onlyLabels: ["{model} is a classifier: it only classifies.", "{model} 是分类模型，只能用于分类。"],
  noLabels: ["{model} is a language model, without classes.", "{model} 是语言模型，没有类别可分。"],
  chatTry: [
    "Name three primary colors.\nWhat is a neural network?\nWrite a short poem about the sea.",
    "三原色是哪三种颜色？\n什么是神经网络？\n写一首关于大海的短诗。",
  ],
  completeTry: ["Once upon a time,\ndef main(\nThe history of", "从前有座山，\ndef main(\n人工智能的发展"],
  classifyTry: [
    "WINNER!! Call now to claim your free prize.\nAre we still meeting for lunch today?",
    "恭喜中奖！立即致电领取免费奖品。\n今天中午还一起吃饭吗？",
  ],
  legend: ["Probability of a token:", "词元概率："],

  loading: ["Loading {model}…", "正在加载 {model}……"],
  starting: ["The engine is starting…", "引擎正在启动……"],
  noModels: ["There are no models yet: python train.py makes one.", "还没有模型：运行 python train.py 训练一个。"],
  offline: ["The server cannot be reached. Trying again…", "无法连接服务器，正在重试……"],
  back: ["The server is back.", "服务器已恢复。"],
  full: ["This browser's storage is full: what is new lasts until the page is closed.", "浏览器存储已满：新内容只保留到页面关闭。"],
  tryAgain: ["Try again", "重试"],
  forgetOldest: ["Go on without the oldest messages", "去掉最早的消息后继续"],
  "is.key": ["An API key is needed.", "需要 API 密钥。"],
  "is.forbidden": ["The server does not answer this.", "服务器拒绝了请求。"],
  "is.context": ["The text is longer than the model's context.", "内容超出了模型的上下文长度。"],
  "is.model": ["This model does not exist.", "该模型不存在。"],
  "is.busy": ["The server is busy; try again in a moment.", "服务器繁忙，请稍后再试。"],
  "is.starting": ["The engine is away; try again in a moment.", "引擎暂不可用，请稍后再试。"],
  "is.invalid": ["The server does not take this.", "服务器不接受该请求。"],
  "is.failed": ["The server failed.", "服务器出错了。"],
  "is.offline": ["The server cannot be reached.", "无法连接服务器。"],
  "is.proxy": ["A proxy in front of the server asks you to sign in: reload the page.", "服务器前面的代理要求登录：请刷新页面。"],
  "is.cut": ["The connection broke.", "连接中断了。"],

  params: ["{n} parameters", "{n} 参数"],
  contextIs: ["context {n}", "上下文 {n}"],
  stepIs: ["step {n}", "第 {n} 步"],
  noRuns: ["There are no runs yet: python train.py makes one.", "还没有训练记录：运行 python train.py 开始一个。"],
  runsTitle: ["Runs", "训练记录"],
  talk: ["Talk to it", "与它对话"],
  tryIt: ["Try it", "试一试"],
  report: ["Report", "报告"],
  inTab: ["Open in a new tab", "在新标签页中打开"],
  finished: ["finished", "已完成"],
  training: ["training", "训练中"],
  halted: ["not finished", "未完成"],
  damaged: ["damaged", "已损坏"],
  stepOf: ["step {n} of {most}", "第 {n} / {most} 步"],
  steps: ["{n} steps", "{n} 步"],
  trainLoss: ["training loss, last step", "训练损失（最后一步）"],
  valLoss: ["validation loss", "验证损失"],
  accuracy: ["accuracy", "准确率"],
  bits: ["bits per byte", "比特/字节"],
  speed: ["tokens/s", "词元/秒"],
  curvesOf: ["Loss over optimizer steps: {told}", "损失随优化步数的变化：{told}"],
  backToTalk: ["Back to the models", "返回模型"],
};

const LANGUAGES = ["en", "zh"];
const listeners = [];

export const language = () => (document.documentElement.lang === "zh" ? "zh" : "en");

/** t("tokens", { n: 3 }) in the page's language. */
export function t(name, values = {}) {
  const text = WORDS[name][LANGUAGES.indexOf(language())];
  return text.replace(/\{(\w+)\}/g, (_, value) => values[value] ?? "");
}

export function number(value, digits = 0) {
  const shown = { maximumFractionDigits: digits };
  return new Intl.NumberFormat(language(), shown).format(value);
}

export function percent(value) {
  const digits = value > 0.999 || value < 0.001 ? 2 : 1;
  const shown = { style: "percent", maximumFractionDigits: digits };
  return new Intl.NumberFormat(language(), shown).format(value);
}

/** Change the language and call the listeners. */
export function setLanguage(name) {
  document.documentElement.lang = name;
  translate(document);
  for (const listener of listeners) listener();
}

export function onLanguage(listener) {
  listeners.push(listener);
}

export function translate(root) {
  for (const element of root.querySelectorAll("[data-t]")) {
    element.textContent = t(element.dataset.t);
  }
  for (const element of root.querySelectorAll("[data-t-label]")) {
    const label = t(element.dataset.tLabel);
    element.setAttribute("aria-label", label);
    element.title = label;
  }
  for (const element of root.querySelectorAll("[data-t-placeholder]")) {
    element.placeholder = t(element.dataset.tPlaceholder);
  }
}
