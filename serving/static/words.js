// Texts in English and Chinese, which elements name in data-t, data-t-label and data-t-placeholder.

export const WORDS = {
  chat: ["Chat", "对话"],
  complete: ["Complete", "续写"],
  classify: ["Classify", "分类"],
  runs: ["Runs", "训练记录"],
  model: ["Model", "模型"],
  settings: ["Settings", "设置"],
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
  nothingKept: ["Conversations are stored in this browser.", "对话仅保存在此浏览器中。"],
  log: ["Conversation", "对话内容"],
  you: ["You", "你"],
  answer: ["Answer", "回答"],
  message: ["Message", "消息"],
  messageHere: ["Type a message…", "输入消息……"],
  send: ["Send", "发送"],
  stop: ["Stop", "停止"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  edit: ["Edit and send again", "编辑并重新发送"],
  editing: [
    "Editing an earlier message; the messages after it will be replaced.",
    "正在编辑之前的消息，其后的内容将被替换。",
  ],
  callOf: ["Call of {name}", "调用 {name}"],
  resultOf: ["Result of {name}", "{name} 的结果"],
  called: ["The model called {name}.", "模型调用了 {name}。"],
  asMessage: ["Send a message instead", "改为发送消息"],
  again: ["Regenerate", "重新生成"],
  earlier: ["Previous answer", "上一个回答"],
  later: ["Next answer", "下一个回答"],
  chatHint: ["Enter to send, Shift+Enter for a new line, Esc to stop", "Enter 发送，Shift+Enter 换行，Esc 停止"],
  chatEmpty: ["Chat with {model}", "与 {model} 对话"],
  chatUntaught: [
    "This is a base model: it continues text and may not answer like an assistant.",
    "这是基座模型：它只会续写文本，不一定能像助手那样回答。",
  ],
  forgotten: ["The messages above are no longer sent to the model.", "以上消息不再发送给模型。"],
  writing: ["Generating…", "正在生成……"],
  thinking: ["Processing the prompt…", "正在处理提示……"],
  done: ["The answer is complete.", "回答已完成。"],
  stopped: ["stopped", "已停止"],
  cutLength: ["token limit reached", "已达到词元上限"],
  nothingSaid: ["(empty)", "（空）"],
  tokens: ["{n} tokens", "{n} 个词元"],
  perSecond: ["{n} tokens/s", "{n} 词元/秒"],
  first: ["first token after {n} s", "首个词元用时 {n} 秒"],
  context: ["{n} of {most} tokens", "{n} / {most} 个词元"],

  text: ["Text", "文本"],
  textHere: ["Enter a text for the model to continue.", "输入一段文本，由模型续写。"],
  go: ["Continue", "续写"],
  clear: ["Clear", "清空"],
  score: ["Show probabilities", "显示概率"],
  completeHint: ["Ctrl+Enter to continue, Esc to stop; hover over a token for alternatives", "Ctrl+Enter 续写，Esc 停止；鼠标悬停在词元上可查看候选"],
  candidates: ["Candidates", "候选词元"],
  take: ["Continue with {token} instead", "改用 {token} 续写"],

  classifyHere: ["Enter a text to classify", "输入要分类的文本"],
  classifyHint: ["Ctrl+Enter to classify; also updates as you type.", "Ctrl+Enter 分类；输入时结果会自动更新。"],
  options: ["Options", "选项"],
  optionsHint: [
    "One per line. Each is scored as what comes next, so a word often begins with a space.",
    "每行一个。每个选项都作为文本的后续内容来计算概率，因此英文单词前常需空格。",
  ],
  labels: ["Labels", "标签"],
  labelIs: ["{label}, {percent}", "{label}，{percent}"],
  took: ["{n} ms", "{n} 毫秒"],

  sampling: ["Sampling", "采样"],
  systemPrompt: ["System prompt for this conversation", "本对话的系统提示词"],
  reset: ["Reset to defaults", "恢复默认"],
  temperature: ["Temperature", "温度"],
  temperatureHint: ["0 picks the most likely token", "0 总是选择概率最高的词元"],
  top_p: ["Top-p", "Top-p"],
  top_k: ["Top-k", "Top-k"],
  min_p: ["Min-p", "Min-p"],
  max_tokens: ["Max tokens", "最大词元数"],
  off: ["{n} = off", "{n} 表示关闭"],
  max_tokensHint: ["per answer", "每个回答"],
  presence_penalty: ["Presence penalty", "存在惩罚"],
  frequency_penalty: ["Frequency penalty", "频率惩罚"],
  repetition_penalty: ["Repetition penalty", "重复惩罚"],
  stopStrings: ["Stop strings, one per line", "停止字符串，每行一个"],
  schema: ["JSON schema of the answer", "回答的 JSON Schema"],
  schemaHint: ['leave empty for text; {"type": "object"} is any object', '留空则为普通文本；{"type": "object"} 表示任意对象'],
  isJson: ["valid JSON", "有效的 JSON"],
  notJson: ["incomplete JSON", "JSON 不完整"],
  tools: ["Tools", "工具"],
  toolsHint: ["JSON array of functions, as in the OpenAI API", "函数的 JSON 数组，格式同 OpenAI API"],
  toolsTry: ["Insert an example", "插入示例"],
  toolChoice: ["Tool choice", "工具选择"],
  toolChoiceHint: ["After a result, the model answers in text.", "收到结果后，模型以文本回答。"],
  required: ["required: call a tool", "required：调用工具"],
  auto: ["auto: answer in text", "auto：以文本回答"],
  seed: ["Seed", "随机种子"],
  seedHint: ["leave empty for a random seed", "留空则每次随机"],
  forgetKey: ["Remove the API key", "清除 API 密钥"],

  keyTitle: ["This server requires an API key", "此服务器需要 API 密钥"],
  keyWrong: ["Invalid API key.", "API 密钥无效。"],
  keyKept: ["The key is stored until this tab is closed.", "密钥仅保存到此标签页关闭。"],
  key: ["API key", "API 密钥"],
  keyGo: ["Continue", "继续"],
  keyNone: ["No API key was entered.", "未输入 API 密钥。"],

  chooseModel: ["{model} was requested; select another model above.", "请求的模型是 {model}，请在上方另选一个。"],
  onlyLabels: ["{model} is a classifier and cannot generate text.", "{model} 是分类模型，不能生成文本。"],
  chatTry: [
    "Name three primary colors.\nWhat is a neural network?\nWrite a short poem about the sea.",
    "三原色是哪三种颜色？\n什么是神经网络？\n写一首关于大海的短诗。",
  ],
  completeTry: ["Once upon a time,\ndef main(\nThe history of", "从前有座山，\ndef main(\n人工智能的发展"],
  classifyTry: [
    "WINNER!! Call now to claim your free prize.\nAre we still meeting for lunch today?",
    "恭喜中奖！立即致电领取免费奖品。\n今天中午还一起吃饭吗？",
  ],
  choiceTry: ["The sky is| blue| green| red\nimport| os| time| numpy", "天空是|蓝色|绿色|红色\nimport| os| time| numpy"],
  legend: ["Token probability:", "词元概率："],

  loading: ["Loading {model}…", "正在加载 {model}……"],
  starting: ["The engine is starting…", "引擎正在启动……"],
  noModels: ["No models yet; run python train.py to train one.", "还没有模型：运行 python train.py 训练一个。"],
  offline: ["The server cannot be reached. Retrying…", "无法连接服务器，正在重试……"],
  back: ["Reconnected.", "已重新连接。"],
  full: ["Browser storage is full: new content is lost when the page is closed.", "浏览器存储已满：新内容会在关闭页面后丢失。"],
  tryAgain: ["Try again", "重试"],
  forgetOldest: ["Continue without the oldest messages", "去掉最早的消息后继续"],
  "is.key": ["An API key is required.", "需要 API 密钥。"],
  "is.forbidden": ["The server refused the request.", "服务器拒绝了该请求。"],
  "is.context": ["The text is longer than the model's context.", "内容超出了模型的上下文长度。"],
  "is.model": ["This model does not exist.", "该模型不存在。"],
  "is.busy": ["The server is busy; try again in a moment.", "服务器繁忙，请稍后再试。"],
  "is.starting": ["The engine is unavailable; try again in a moment.", "引擎暂不可用，请稍后再试。"],
  "is.invalid": ["The request is invalid.", "请求无效。"],
  "is.failed": ["The server failed.", "服务器出错。"],
  "is.offline": ["The server cannot be reached.", "无法连接服务器。"],
  "is.proxy": ["A proxy in front of the server requires a login; reload the page.", "服务器前端的代理要求登录，请刷新页面。"],
  "is.cut": ["The connection was lost.", "连接已中断。"],

  params: ["{n} parameters", "参数量 {n}"],
  contextIs: ["context {n}", "上下文 {n}"],
  stepIs: ["step {n}", "第 {n} 步"],
};

const LANGUAGES = ["en", "zh"];
const listeners = [];

export const language = () => (document.documentElement.lang === "zh" ? "zh" : "en");

/** Return a text in the page's language: t("tokens", { n: 3 }). */
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
    element.ariaLabel = element.title = t(element.dataset.tLabel);
  }
  for (const element of root.querySelectorAll("[data-t-placeholder]")) {
    element.placeholder = t(element.dataset.tPlaceholder);
  }
}
