// @openrouter/agent: callModel goes round with tools by itself, over Responses.
import { OpenRouter, callModel, tool } from "@openrouter/agent";
import { z } from "zod";
import { MAX_TOKENS, MODEL, SCHEMA, SUM, TWO_CITIES, FUNCTION, main, messageOf, url, weather } from "./common.mjs";

const api = new OpenRouter({ apiKey: "sk-or-none", serverURL: `${url}/api/v1`, retryConfig: { strategy: "none" } });
const ask = (input, fields = {}) =>
  callModel(api, { model: MODEL, input, temperature: 0, maxOutputTokens: MAX_TOKENS, ...fields });
const heard = ({ output, usage }) => ({
  text: output.filter((item) => item.type === "message").map((item) => item.content[0].text).join(""),
  tokens: [usage.inputTokens, usage.outputTokens, usage.totalTokens],
  thought: output.filter((item) => item.type === "reasoning").map((item) => item.content[0].text).join(""),
});

const chat = async () => heard(await ask(SUM, { reasoning: { effort: "high" } }).getResponse());

async function stream() {
  const result = ask(SUM);
  let text = "";
  for await (const delta of result.getTextStream()) text += delta;
  return { ...heard(await result.getResponse()), text };
}

async function tools() {
  const calls = [];
  const getWeather = tool({
    name: FUNCTION.name,
    description: FUNCTION.description,
    inputSchema: z.object({ location: z.string().describe("Name of the city") }), // zod's schemas are news to it
    execute: async ({ location: city }) => (calls.push({ city }), weather({ city })),
  });
  return { text: await ask(TWO_CITIES, { tools: [getWeather] }).getText(), calls };
}

const no_thought = async () =>
  heard(await ask(SUM, { reasoning: { effort: "none" } }).getResponse()).thought || null;
const json_schema = async () => {
  const format = { type: "json_schema", name: "answer", strict: true, schema: SCHEMA };
  return JSON.parse(await ask("A city.", { text: { format } }).getText());
};
const error = () => messageOf(() => ask(SUM, { temperature: 3 }).getText());

await main({ chat, stream, tools, no_thought, json_schema, error });
