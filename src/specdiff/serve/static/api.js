// Requests to the server, and the events of a stream.

const KEY = "specdiff-key";

/** A refusal of the server, or a lost connection. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, param?: string | null, retryAfter?: string | null}} details
   */
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** The entry of /v1/models. Throws ApiError. */
export async function model() {
  const answer = await send("v1/models", {});
  return (await answer.json()).data[0];
}

/**
 * The parsed events of one streamed answer, with the records of its rounds if `rounds`.
 * Throws ApiError, or AbortError if stopped.
 */
export async function* events(path, body, rounds, signal) {
  const options = {
    method: "POST",
    signal,
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_rounds: rounds, include_usage: true },
    }),
  };
  const answer = await send(path, options);
  for await (const data of lines(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, { status: event.error.code });
    yield event;
  }
  throw new ApiError("The connection ended before the answer did.");
}

async function send(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  throw new ApiError(error?.message ?? `The server answered ${answer.status}.`, {
    status: answer.status,
    param: error?.param,
    retryAfter: answer.headers.get("Retry-After"),
  });
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) return;
      const parts = (pending + value).split("\n\n");
      pending = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield part.slice(6); // others are comments
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // after an error event; otherwise it has ended
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost.");
  }
}
