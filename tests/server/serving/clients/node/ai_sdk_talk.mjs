// The AI SDK, with the provider that the second argument names.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenRouter } from "@openrouter/ai-sdk-provider";
import { Output, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { FUNCTION, MAX_TOKENS, MODEL, PARAMETERS, SCHEMA, SUM, TWO_CITIES, main, messageOf, url, weather } from "./common.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false; // they would go to where the answer is read

// The id of the last answer: the AI SDK tells none of an answer that is cut off.
let lastId;
async function noted(...request) {
  const response = await fetch(...request);
  lastId = response.headers.get("x-generation-id");
  return response;
}

const openAI = { baseURL: `${url}/v1`, apiKey: "none", fetch: noted };
// Each has its own names for how hard to think.
const providers = {
  "openai-compatible": [
    createOpenAICompatible({ ...openAI, name: "glmserve", includeUsage: true, supportsStructuredOutputs: true })(MODEL),
    { glmserve: { reasoningEffort: "high" } }, { glmserve: { reasoningEffort: "none" } },
  ],
  openai: [
    createOpenAI(openAI).responses(MODEL),
    { openai: { reasoningEffort: "high", reasoningSummary: "auto", forceReasoning: true } },
    { openai: { reasoningEffort: "none", forceReasoning: true } },
  ],
  anthropic: [
    createAnthropic(openAI)(MODEL),
    { anthropic: { thinking: { type: "adaptive" } } }, { anthropic: { thinking: { type: "disabled" } } },
  ],
  openrouter: [
    createOpenRouter({ baseURL: `${url}/api/v1`, apiKey: "sk-or-none", fetch: noted })(MODEL),
    { openrouter: { reasoning: { effort: "high" } } }, { openrouter: { reasoning: { effort: "none" } } },
  ],
};
const [model, thinks, thinksNot] = providers[process.argv[3]];
const asked = (prompt, fields = {}) =>
  ({ model, prompt, temperature: 0, maxOutputTokens: MAX_TOKENS, maxRetries: 0, ...fields });
const tokens = (usage) => [usage.inputTokens, usage.outputTokens, usage.totalTokens];

async function chat() {
  const { text, usage, reasoningText } = await generateText(asked(SUM, { providerOptions: thinks }));
  return { text, tokens: tokens(usage), thought: reasoningText };
}

async function stream() {
  const result = streamText(asked(SUM, { providerOptions: thinks }));
  let text = "";
  for await (const delta of result.textStream) text += delta;
  return { text, tokens: tokens(await result.usage) };
}

async function tools() {
  const calls = [];
  const getWeather = tool({
    description: FUNCTION.description,
    inputSchema: jsonSchema(PARAMETERS),
    execute: async (given) => (calls.push(given), weather(given)),
  });
  const fields = { tools: { [FUNCTION.name]: getWeather }, stopWhen: stepCountIs(3), providerOptions: thinksNot };
  const { text } = await generateText(asked(TWO_CITIES, fields));
  return { calls, text };
}

const no_thought = async () =>
  (await generateText(asked(SUM, { providerOptions: thinksNot }))).reasoningText || null;
const json_schema = async () => {
  const output = Output.object({ schema: jsonSchema(SCHEMA), name: "answer" });
  return (await generateText(asked("A city.", { output, providerOptions: thinksNot }))).output;
};
const error = () => messageOf(() => generateText(asked(SUM, { topP: 3 })));

async function cancel() {
  const leaving = new AbortController();
  const { fullStream } = streamText(asked(SUM, { abortSignal: leaving.signal }));
  for await (const part of fullStream) if (part.type.endsWith("-delta")) leaving.abort();
  return lastId;
}

await main({ chat, stream, tools, no_thought, json_schema, error, cancel });
