// @openrouter/sdk: chat.
import { OpenRouter } from "@openrouter/sdk";
import { FORMAT, MAX_TOKENS, MODEL, NUM_TOP, SUM, TOOL, TWO_CITIES, main, messageOf, url, user, weather } from "./common.mjs";

const api = new OpenRouter({ apiKey: "sk-or-none", serverURL: `${url}/api/v1`, retryConfig: { strategy: "none" } });
const camel = ({ type, json_schema }) => ({ type, jsonSchema: json_schema });
const ask = (messages, fields = {}) =>
  api.chat.send({ chatRequest: { model: MODEL, messages, temperature: 0, maxTokens: MAX_TOKENS, stream: false, ...fields } });
const tokens = (usage) => [usage.promptTokens, usage.completionTokens, usage.totalTokens];

async function chat() {
  const answer = await ask([user(SUM)], { reasoning: { effort: "high" }, logprobs: true, topLogprobs: NUM_TOP });
  const [{ message, logprobs }] = answer.choices;
  return {
    text: message.content,
    tokens: tokens(answer.usage),
    thought: message.reasoning,
    scored: logprobs.content.flatMap((score) => score.bytes),
    logprobs: logprobs.content.map((score) => score.logprob),
    num_top: logprobs.content.map((score) => score.topLogprobs.length),
  };
}

async function stream() {
  let text = "";
  let usage;
  for await (const chunk of await ask([user(SUM)], { stream: true })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, tokens: tokens(usage) };
}

async function tools() {
  const messages = [user(TWO_CITIES)];
  const { message } = (await ask(messages, { tools: [TOOL] })).choices[0];
  const calls = message.toolCalls.map((call) => JSON.parse(call.function.arguments));
  messages.push(message);
  message.toolCalls.forEach((call, at) =>
    messages.push({ role: "tool", toolCallId: call.id, content: weather(calls[at]) }));
  return { calls, text: (await ask(messages, { tools: [TOOL] })).choices[0].message.content };
}

const no_thought = async () =>
  (await ask([user(SUM)], { reasoning: { effort: "none" } })).choices[0].message.reasoning ?? null;
const json_schema = async () =>
  JSON.parse((await ask([user("A city.")], { responseFormat: camel(FORMAT) })).choices[0].message.content);
const error = () => messageOf(() => ask([user(SUM)], { temperature: 3 }));

async function cancel() {
  for await (const chunk of await ask([user(SUM)], { stream: true })) return chunk.id;
}

await main({ chat, stream, tools, no_thought, json_schema, error, cancel });
