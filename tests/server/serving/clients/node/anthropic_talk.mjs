// @anthropic-ai/sdk.
import Anthropic from "@anthropic-ai/sdk";
import { FUNCTION, MAX_TOKENS, MODEL, PARAMETERS, SCHEMA, SUM, TWO_CITIES, main, messageOf, url, user, weather } from "./common.mjs";

const api = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const TOOLS = [{ name: FUNCTION.name, description: FUNCTION.description, input_schema: PARAMETERS }];
const THINKS = { thinking: { type: "adaptive" } };
const body = (messages, fields) => ({ model: MODEL, messages, temperature: 0, max_tokens: MAX_TOKENS, ...fields });
const ask = (messages, fields = {}) => api.messages.create(body(messages, fields));
const joined = (content, type, field) =>
  content.filter((block) => block.type === type).map((block) => block[field]).join("");
const heard = ({ content, usage }) => {
  const prompt = usage.input_tokens + usage.cache_read_input_tokens;
  return {
    text: joined(content, "text", "text"),
    tokens: [prompt, usage.output_tokens, prompt + usage.output_tokens],
    thought: joined(content, "thinking", "thinking"),
  };
};

const chat = async () => heard(await ask([user(SUM)], THINKS));

async function stream() {
  const runner = api.messages.stream(body([user(SUM)], THINKS));
  let text = "";
  runner.on("text", (delta) => (text += delta));
  return { ...heard(await runner.finalMessage()), text };
}

async function tools() {
  const messages = [user(TWO_CITIES)];
  const { content } = await ask(messages, { tools: TOOLS });
  const calls = content.filter((block) => block.type === "tool_use");
  const results = calls.map(({ id, input }) => ({ type: "tool_result", tool_use_id: id, content: weather(input) }));
  messages.push({ role: "assistant", content }, { role: "user", content: results });
  return { calls: calls.map((call) => call.input), text: heard(await ask(messages, { tools: TOOLS })).text };
}

const no_thought = async () => heard(await ask([user(SUM)], { thinking: { type: "disabled" } })).thought || null;
const json_schema = async () => {
  const output_config = { format: { type: "json_schema", schema: SCHEMA } };
  return JSON.parse(heard(await ask([user("A city.")], { output_config })).text);
};
const error = () => messageOf(() => ask([user(SUM)], { temperature: 3 }));

async function cancel() {
  for await (const event of await ask([user(SUM)], { stream: true })) return event.message.id.replace("msg_", "gen-");
}

await main({ chat, stream, tools, no_thought, json_schema, error, cancel });
