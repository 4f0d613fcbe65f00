// Texts of the runs page in English and Chinese.

import { WORDS } from "./words.js";

Object.assign(WORDS, {
  noRuns: ["No runs yet; run python train.py to start one.", "还没有训练记录：运行 python train.py 开始训练。"],
  tryIt: ["Try it", "试一试"],
  report: ["Report", "报告"],
  inTab: ["Open in a new tab", "在新标签页中打开"],
  finished: ["finished", "已完成"],
  training: ["training", "训练中"],
  halted: ["not finished", "未完成"],
  damaged: ["damaged", "已损坏"],
  stepOf: ["step {n} of {most}", "第 {n} / {most} 步"],
  steps: ["{n} steps", "{n} 步"],
  trainLoss: ["training loss (last step)", "训练损失（最后一步）"],
  valLoss: ["validation loss", "验证损失"],
  accuracy: ["accuracy", "准确率"],
  bits: ["bits per byte", "每字节比特数"],
  speed: ["tokens/s", "词元/秒"],
  curvesOf: ["Loss by optimizer step: {values}", "各优化步的损失：{values}"],
  backToTalk: ["Back to the models", "返回模型"],
  rank: ["rank", "名次"],
  run: ["run", "训练"],
  seeds: ["seeds", "种子数"],
  difference: ["difference to the best", "与最佳之差"],
  interval: ["95 % interval", "95% 区间"],
  time: ["time, s", "用时（秒）"],
});
