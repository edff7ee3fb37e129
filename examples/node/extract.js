// Print features of photos as JSON lines: `node extract.js PHOTO... > features.jsonl`
//
// The server is DINOV3_TARGET (default localhost:50051). Each line has the photo's path, its CLS token and the mean of
// its patch tokens. Copy protos/ beside your code, and set PROTOS to where it is.

const fs = require("node:fs");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const TARGET = process.env.DINOV3_TARGET || "localhost:50051";
const PROTOS = path.join(__dirname, "..", "..", "protos");
const PHOTOS_PER_REQUEST = 32;

const definition = protoLoader.loadSync("dinov3_serving/v1/feature_service.proto", {
  includeDirs: [PROTOS],
  enums: String,
  longs: Number,
  defaults: true,
});
const { FeatureService } = grpc.loadPackageDefinition(definition).dinov3_serving.v1;

const client = new FeatureService(TARGET, grpc.credentials.createInsecure(), {
  // grpc-js refuses answers over 4 MB by default. The server has a limit of its own: GetModel's limits.maxMessageBytes.
  "grpc.max_receive_message_length": -1,
  // Another attempt, after a pause, while the server restarts.
  "grpc.service_config": JSON.stringify({
    methodConfig: [
      {
        name: [{ service: "dinov3_serving.v1.FeatureService" }],
        retryPolicy: {
          maxAttempts: 5,
          initialBackoff: "0.2s",
          maxBackoff: "2s",
          backoffMultiplier: 2,
          retryableStatusCodes: ["UNAVAILABLE"],
        },
      },
    ],
  }),
});

function call(method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, { deadline: Date.now() + 60_000 }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

// The default dtype of features is bfloat16, which JavaScript has no array for: ask for float32, or decode it. bfloat16
// is the upper half of a float32 and half of its bytes.
function toFloat32Array(tensor) {
  const { buffer, byteOffset, length } = tensor.data;
  const bytes = buffer.slice(byteOffset, byteOffset + length); // typed arrays must begin at a multiple of their size
  if (tensor.dtype === "DATA_TYPE_FLOAT32") return new Float32Array(bytes);
  if (tensor.dtype !== "DATA_TYPE_BFLOAT16") throw new Error(`cannot decode ${tensor.dtype}`);
  return new Float32Array(Uint32Array.from(new Uint16Array(bytes), (bits) => bits << 16).buffer);
}

// Return [dims] of row `row` of [rows, dims].
function rowOf(values, row, dims) {
  return values.subarray(row * dims, (row + 1) * dims);
}

// Return the mean over the tokens of [tokens, dims].
function mean(values, dims) {
  const sum = new Float64Array(dims);
  values.forEach((value, index) => (sum[index % dims] += value));
  return Float32Array.from(sum, (value) => value / (values.length / dims));
}

async function extract(photos, dtype) {
  const answer = await call("extract", {
    images: photos.map((photo) => ({ encoded: fs.readFileSync(photo) })),
    preprocessing: { preset: "PRESET_DINOV3" },
    outputs: { cls: true, patches: true, dtype },
  });
  for (const { imageIndex, status } of answer.errors) console.error(`${photos[imageIndex]}: ${status.message}`);
  const failed = new Set(answer.errors.map((error) => error.imageIndex));

  const features = [];
  for (const block of answer.blocks) {
    const [rows, tokens, dims] = block.patches.shape;
    const cls = toFloat32Array(block.cls);
    const patches = toFloat32Array(block.patches);
    if (cls.length !== rows * dims || patches.length !== rows * tokens * dims) throw new Error("wrong shapes");
    block.imageIndices.forEach((image, row) => {
      if (failed.has(image)) return; // the row of an image that failed is zeros
      const patchMean = mean(rowOf(patches, row, tokens * dims), dims);
      features.push({ photo: photos[image], cls: [...rowOf(cls, row, dims)], patch_mean: [...patchMean] });
    });
  }
  return features;
}

async function main(photos) {
  const model = await call("getModel", {});
  console.error(`${model.model}, ${model.embedDim} channels`);
  for (let start = 0; start < photos.length; start += PHOTOS_PER_REQUEST) {
    const batch = photos.slice(start, start + PHOTOS_PER_REQUEST);
    for (const line of await extract(batch, "DATA_TYPE_BFLOAT16")) console.log(JSON.stringify(line));
  }
  client.close();
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error.message);
  process.exit(1);
});
