// Parses {kind, value, case} from standard input by the schemas (zod) of @openrouter/sdk; prints what they refuse.
import * as models from "@openrouter/sdk/models";
import * as errors from "@openrouter/sdk/models/errors";

const schemas = {
  response: models.OpenResponsesResult$inboundSchema,
  "response event": models.StreamEvents$inboundSchema,
  chat: models.ChatResult$inboundSchema,
  "chat event": models.ChatStreamChunk$inboundSchema,
  models: models.ModelsListResponse$inboundSchema,
  "models/count": models.ModelsCountResponse$inboundSchema,
};

// Unions of the SDK take what they cannot read for a kind of the future, and mark it.
function* unknowns(value, path) {
  if (typeof value !== "object" || value === null) return;
  if (value.isUnknown) yield `${path}: not of the SDK: ${JSON.stringify(value.raw)}`;
  for (const [name, part] of Object.entries(value)) if (name !== "raw") yield* unknowns(part, `${path}.${name}`);
}

const text = await new Promise((resolve) => {
  let all = "";
  process.stdin.on("data", (part) => (all += part)).on("end", () => resolve(all));
});
const refused = [];
let count = 0;
for (const { kind, value, case: name } of JSON.parse(text)) {
  if (!(kind in schemas)) continue;
  count += 1;
  const parsed = schemas[kind].safeParse(value);
  const faults = parsed.success
    ? [...unknowns(parsed.data, "")]
    : parsed.error.issues.map((issue) => `${issue.path.join(".")}: ${issue.message}`);
  refused.push(...faults.map((fault) => `${kind} (${name}) ${value.type ?? ""} ${fault}`));
}
console.log(JSON.stringify({ count, refused }));
