// Talks to the server that this page came from: OpenAI's interface, streamed, and its samples.
const BASE = new URL("v1/", location.href);
const N_ALTERNATIVES = 5;

class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// Storage that may be forbidden or full.
const stored = (storage, name, value) => {
  try {
    const box = window[storage];
    if (value === undefined) return box.getItem(`gptcli ${name}`);
    if (value) box.setItem(`gptcli ${name}`, value); else box.removeItem(`gptcli ${name}`);
  } catch { /* the page works without */ }
  return null;
};

let apiKey = stored("sessionStorage", "key") ?? "";

const ask = async (path, body, signal) => {
  const headers = apiKey ? {Authorization: `Bearer ${apiKey}`} : {};
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(new URL(path, BASE), {
      method: body ? "POST" : "GET", headers, signal, cache: "no-store",
      body: body && JSON.stringify(body),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure(`The server at ${location.host} does not answer. `
                      + "Start it again with gpt serve, then try again.");
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
};

const refusal = async (answer) => {
  let message = `The server answers ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* an answer of another program */ }
  const wait = Number(answer.headers.get("Retry-After")) || 1;
  if (answer.status === 401)
    message = apiKey ? "The server does not accept this key." : "This server asks for an API key.";
  if (answer.status === 429)
    message = `The server is busy. Try again in ${wait} second${wait === 1 ? "" : "s"}.`;
  return new Failure(message, answer.status);
};

// The JSON objects of a stream of server-sent events.
async function* eventsOf(answer, signal) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const lost = new Failure("The connection was lost. What came before is kept.");
  let held = "";
  try {
    for (;;) {
      const {done, value} = await reader.read().catch((error) => {
        throw signal.aborted ? error : lost;
      });
      if (done) throw lost;
      const lines = (held + value).split("\n");
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const found = JSON.parse(data);
        if (found.error) throw new Failure(found.error.message);
        yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});  // hangs up, so that the server stops
  }
}

// What is asked of the server, less the prompt; `seed` is chosen if none is set.
const sampling = (settings) => {
  const body = {seed: Math.floor(Math.random() * 2 ** 31)};
  for (const [name, value] of Object.entries(settings))
    if (value !== null && value.length !== 0) body[name] = value;
  return body;
};

// OpenAI's lists of a text's log-probabilities have no ids and no bytes: the server adds them.
const tokensOf = ({gptcli: {tokens, top}}) => {
  const token = ([id, logprob, bytes]) => ({id, logprob, bytes});
  return tokens.map((one, i) => ({...token(one), top: top[i].map(token)}));
};

// Yields {tokens: [{id, logprob, bytes, top}], prompt, finish} as the model writes.
// `prompt` is a text or ids; the ids that the server read come with the first.
async function* complete(model, prompt, how, signal) {
  const body = {model, prompt, ...how, stream: true, logprobs: N_ALTERNATIVES,
                truncate_prompt_tokens: -1};
  for await (const {choices} of eventsOf(await ask("completions", body, signal), signal)) {
    const choice = choices[0];
    if (!choice) continue;
    yield {tokens: choice.logprobs ? tokensOf(choice.logprobs) : [],
           prompt: choice.logprobs?.gptcli.prompt, finish: choice.finish_reason};
  }
}

// Yields the parts of an answer's text, and why it ended.
async function* answerTo(model, messages, how, signal) {
  const body = {model, messages, ...how, stream: true};
  for await (const {choices} of eventsOf(await ask("chat/completions", body, signal), signal))
    if (choices[0]) yield {text: choices[0].delta.content ?? "", finish: choices[0].finish_reason};
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// The same request as a command line and as a program; the key stays a variable.
const asCurl = (path, body) => [
  `curl ${quoted(new URL(path, BASE).href)}`,
  "-H 'Content-Type: application/json'",
  ...apiKey ? ['-H "Authorization: Bearer $GPT_API_KEY"'] : [],
  `-d ${quoted(JSON.stringify(body))}`,
].join(" \\\n  ") + "\n";

const asPython = (path, body) => {
  const {top_k, min_p, ...known} = body;
  const extra = Object.fromEntries(
    Object.entries({top_k, min_p}).filter(([, value]) => value !== undefined));
  const isChat = path !== "completions";
  const lines = Object.entries(known).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${JSON.stringify(extra)},`);
  return [
    ...apiKey ? ["import os", ""] : [],
    "from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(BASE.href.replace(/\/$/, ""))}, `
      + `api_key=${apiKey ? 'os.environ["GPT_API_KEY"]' : '"none"'})`,
    `answer = client.${isChat ? "chat.completions" : "completions"}.create(`,
    ...lines, ")",
    `print(answer.choices[0].${isChat ? "message.content" : "text"})`, "",
  ].join("\n");
};
