// openai-node: chat completions.
import OpenAI from "openai";
import { FORMAT, MAX_TOKENS, MODEL, NUM_TOP, SUM, TOOL, TWO_CITIES, main, messageOf, url, user, weather } from "./common.mjs";

const api = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const ask = (messages, fields = {}) =>
  api.chat.completions.create({ model: MODEL, messages, temperature: 0, max_tokens: MAX_TOKENS, ...fields });
const tokens = (usage) => [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens];

async function chat() {
  const answer = await ask([user(SUM)], { reasoning_effort: "high", logprobs: true, top_logprobs: NUM_TOP });
  const [{ message, logprobs }] = answer.choices;
  return {
    text: message.content,
    tokens: tokens(answer.usage),
    thought: message.reasoning,
    scored: logprobs.content.flatMap((score) => score.bytes),
    logprobs: logprobs.content.map((score) => score.logprob),
    num_top: logprobs.content.map((score) => score.top_logprobs.length),
  };
}

async function stream() {
  const runner = api.chat.completions.stream({
    model: MODEL, messages: [user(SUM)], temperature: 0, stream_options: { include_usage: true },
  });
  let text = "";
  for await (const chunk of runner) text += chunk.choices[0]?.delta.content ?? "";
  const final = await runner.finalChatCompletion();
  return { text, tokens: tokens(final.usage) };
}

async function tools() {
  const messages = [user(TWO_CITIES)];
  const { message } = (await ask(messages, { tools: [TOOL] })).choices[0];
  const calls = message.tool_calls.map((call) => JSON.parse(call.function.arguments));
  messages.push(message);
  message.tool_calls.forEach((call, at) =>
    messages.push({ role: "tool", tool_call_id: call.id, content: weather(calls[at]) }));
  return { calls, text: (await ask(messages, { tools: [TOOL] })).choices[0].message.content };
}

const no_thought = async () =>
  (await ask([user(SUM)], { reasoning_effort: "none" })).choices[0].message.reasoning ?? null;
const json_schema = async () =>
  JSON.parse((await ask([user("A city.")], { response_format: FORMAT })).choices[0].message.content);
const error = () => messageOf(() => ask([user(SUM)], { temperature: 3 }));

async function cancel() {
  const events = await ask([user(SUM)], { stream: true });
  for await (const chunk of events) return chunk.id; // leaving the loop ends the connection
}

await main({ chat, stream, tools, no_thought, json_schema, error, cancel });
