// What every SDK is asked, as in ../common.py, and how a talk tells what it heard.
export const url = process.argv[2];
export const MODEL = "glmserve/pocket";
export const SUM = "What is 17+25?";
export const TWO_CITIES = "Compare the weather in Oslo and Madrid.";
export const MAX_TOKENS = 200;
export const NUM_TOP = 2;
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string", description: "Name of the city" } },
  required: ["city"],
};
export const FUNCTION = {
  name: "get_weather",
  description: "Get the current weather for a city.",
  parameters: PARAMETERS,
};
export const TOOL = { type: "function", function: FUNCTION };
export const SCHEMA = {
  title: "Answer",
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] }, is_sunny: { type: "boolean" } },
  required: ["city", "is_sunny"],
  additionalProperties: false,
};
export const FORMAT = { type: "json_schema", json_schema: { name: "answer", strict: true, schema: SCHEMA } };

export const user = (text) => ({ role: "user", content: text });
// With blanks, as Python writes JSON: the small model knows no other form.
export const weather = ({ city }) => `{"city": ${JSON.stringify(city)}, "temperature": 7, "condition": "rain"}`;

// What the error says that this must raise.
export async function messageOf(ask) {
  try {
    await ask();
  } catch (error) {
    return `${error.message} ${error.responseBody ?? ""}`;
  }
  return "";
}

// Plays all scenarios, and prints what was heard by their names.
export async function main(scenarios) {
  const heard = {};
  for (const [name, scenario] of Object.entries(scenarios)) heard[name] = await scenario();
  console.log(JSON.stringify(heard));
  process.exit(0);
}
