// openai-node: Responses.
import OpenAI from "openai";
import { FUNCTION, MAX_TOKENS, MODEL, NUM_TOP, SCHEMA, SUM, TWO_CITIES, main, messageOf, url, user, weather } from "./common.mjs";

const api = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const TOOLS = [{ type: "function", ...FUNCTION }];
const ask = (input, fields = {}) =>
  api.responses.create({ model: MODEL, input, temperature: 0, max_output_tokens: MAX_TOKENS, ...fields });
const heard = ({ output, output_text, usage }) => ({
  text: output_text,
  tokens: [usage.input_tokens, usage.output_tokens, usage.total_tokens],
  thought: output.filter((item) => item.type === "reasoning").map((item) => item.content[0].text).join(""),
});

async function chat() {
  const scored = { top_logprobs: NUM_TOP, include: ["message.output_text.logprobs"] };
  const response = await ask(SUM, { reasoning: { effort: "high" }, ...scored });
  const scores = response.output.at(-1).content[0].logprobs;
  return {
    ...heard(response),
    scored: scores.flatMap((score) => score.bytes),
    logprobs: scores.map((score) => score.logprob),
    num_top: scores.map((score) => score.top_logprobs.length),
  };
}

async function stream() {
  const runner = api.responses.stream({ model: MODEL, input: SUM, temperature: 0 });
  let text = "";
  for await (const event of runner) if (event.type === "response.output_text.delta") text += event.delta;
  return { ...heard(await runner.finalResponse()), text };
}

async function tools() {
  const input = [user(TWO_CITIES)];
  const { output } = await ask(input, { tools: TOOLS });
  const calls = output.filter((item) => item.type === "function_call");
  input.push(...output);
  for (const { call_id, arguments: given } of calls)
    input.push({ type: "function_call_output", call_id, output: weather(JSON.parse(given)) });
  const { output_text } = await ask(input, { tools: TOOLS });
  return { calls: calls.map((call) => JSON.parse(call.arguments)), text: output_text };
}

const no_thought = async () => heard(await ask(SUM, { reasoning: { effort: "none" } })).thought || null;
const json_schema = async () => {
  const format = { type: "json_schema", name: "answer", strict: true, schema: SCHEMA };
  return JSON.parse((await ask("A city.", { text: { format } })).output_text);
};
const error = () => messageOf(() => ask(SUM, { temperature: 3 }));

async function cancel() {
  for await (const event of await ask(SUM, { stream: true })) return event.response.id.replace("resp_", "gen-");
}

await main({ chat, stream, tools, no_thought, json_schema, error, cancel });
