// Loads a trace into Perfetto's own trace processor (WebAssembly) and prints the rows of queries as JSON lines.
//
//   node perfetto_query.js FOLDER TRACE SQL...     FOLDER has engine_bundle.js and trace_processor*.wasm
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const [folder, trace, ...queries] = process.argv.slice(2);

// The engine is a worker of a browser: it fetches its module, and talks through a port.
const port = { postMessage: (data) => onReply(data) };
const file = (name) => fs.readFileSync(path.join(folder, path.basename(String(name))));
class XMLHttpRequest {
  status = 200;
  open(_, name) { this.name = name; }
  send() { this.response = new Uint8Array(file(this.name)).buffer; this.onload?.(); }
}
const context = vm.createContext({
  console: { log: () => {}, error: console.error, warn: () => {} },
  fetch: async (name) => new Response(file(name), {
    headers: { "Content-Type": "application/wasm" },
  }),
  XMLHttpRequest, TextDecoder, TextEncoder, performance, setTimeout, clearTimeout, URL,
  importScripts: () => {}, location: { href: "file:///engine_bundle.js" },
});
context.self = context;
context.WorkerGlobalScope = function WorkerGlobalScope() {};
process.on("uncaughtException", (error) => { console.error(String(error.message).slice(0, 400)); process.exit(1); });
vm.runInContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"), context);
context.onmessage({ data: port });

// Protocol buffers, as far as protos/perfetto/trace_processor/trace_processor.proto needs them.
function varint(value) {
  const bytes = [];
  for (let left = BigInt(value); ; left >>= 7n) {
    if (left < 128n) return Buffer.from([...bytes, Number(left)]);
    bytes.push(Number(left & 127n) | 128);
  }
}
const number = (field, value) => Buffer.concat([varint(field << 3), varint(value)]);
const bytes = (field, value) => Buffer.concat([varint((field << 3) | 2), varint(value.length), value]);
function* fields(buffer) {
  let at = 0;
  const next = () => {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = BigInt(buffer[at++]);
      value |= (byte & 127n) << shift;
      if (byte < 128n) return value;
    }
  };
  while (at < buffer.length) {
    const key = Number(next());
    if ((key & 7) === 0) yield [key >> 3, next()];
    else if ((key & 7) === 1) yield [key >> 3, buffer.subarray(at, (at += 8))];
    else {
      const length = Number(next());
      yield [key >> 3, buffer.subarray(at, (at += length))];
    }
  }
}
function varints(buffer) {
  const values = [];
  let value = 0n, shift = 0n;
  for (const byte of buffer) {
    value |= BigInt(byte & 127) << shift;
    shift += 7n;
    if (byte < 128) { values.push(BigInt.asIntN(64, value)); value = 0n; shift = 0n; }
  }
  return values;
}

const waiting = [];
let received = Buffer.alloc(0);
function onReply(data) {
  received = Buffer.concat([received, Buffer.from(data)]);
  for (const [, message] of fields(received)) waiting.shift()?.(message);
  received = Buffer.alloc(0);
}
let sequence = 0;
function call(method, ...rest) {
  const message = Buffer.concat([number(1, sequence++), number(2, method), ...rest]);
  const answered = new Promise((resolve) => waiting.push(resolve));
  const sent = bytes(1, message);
  port.onmessage({ data: vm.runInContext("(array) => new Uint8Array(array)", context)(sent) });
  return answered;
}

async function query(sql) {
  const answer = await call(3, bytes(103, bytes(1, Buffer.from(sql))));
  const names = [], rows = [];
  for (const [field, result] of fields(answer)) {
    if (field === 5) throw new Error(result.toString());
    if (field !== 203) continue;
    for (const [part, value] of fields(result)) {
      if (part === 1) names.push(value.toString());
      if (part === 2 && value.length) throw new Error(value.toString());
      if (part === 3) rows.push(...cells(value));
    }
  }
  const width = names.length;
  for (let at = 0; at < rows.length; at += width)
    console.log(JSON.stringify(Object.fromEntries(names.map((name, place) => [name, rows[at + place]]))));
}
function cells(batch) {
  const found = { 1: [], 2: [], 3: Buffer.alloc(0), 5: [] };
  for (const [field, value] of fields(batch)) {
    if (field === 1 || field === 2) found[field].push(...varints(value));
    if (field === 3) found[3] = value;
    if (field === 5) found[5] = value.toString().split("\0");
  }
  let whole = 0, real = 0, text = 0;
  return found[1].map((kind) => {
    if (kind === 2n) return Number(found[2][whole++]);
    if (kind === 3n) return found[3].readDoubleLE(8 * real++);
    if (kind === 4n) return found[5][text++];
    return null;
  });
}

async function main() {
  await new Promise((resolve) => setTimeout(resolve, 1500));
  const data = fs.readFileSync(trace);
  for (let at = 0; at < data.length; at += 1 << 20) await call(1, bytes(101, data.subarray(at, at + (1 << 20))));
  await call(2);
  for (const sql of queries) await query(sql);
  process.exit(0);
}
main().catch((error) => { console.error(error); process.exit(1); });
