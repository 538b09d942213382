// A client of another language: `node grpc_js.mjs ADDRESS PROTOS` prints what it saw as JSON.

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const [address, protos] = process.argv.slice(2);
const GZIP = 2, RETIREMENTS = 3, SECONDS = 30;
const keepalive = {'grpc.keepalive_time_ms': 11_000, 'grpc.keepalive_permit_without_calls': 1};
const definition = await protoLoader.load('inference/inference_service.proto', {includeDirs: [protos], keepCase: true});
const {GRPCInferenceService} = grpc.loadPackageDefinition(definition).inference;

const connect = options => new GRPCInferenceService(address, grpc.credentials.createInsecure(), options);
const ask = (client, method, request) => new Promise((resolve, reject) => {
  client[method](request, {deadline: Date.now() + 1000 * SECONDS}, (error, answer) => error ? reject(error) : resolve(answer));
});
const row = (id = '', model_name = 'mlp') => ({
  model_name, id,
  inputs: [{name: 'x', datatype: 'FP32', shape: [1, 6]}],
  raw_input_contents: [Buffer.from(new Float32Array([0, 1, 2, 3, 4, 5]).buffer)],
});
const probabilities = answer => {
  const at = answer.outputs.findIndex(output => output.name === 'probabilities');
  const bytes = Uint8Array.from(answer.raw_output_contents[at]);
  return Array.from(new Float32Array(bytes.buffer));
};

const client = connect(keepalive), packing = connect({...keepalive, 'grpc.default_compression_algorithm': GZIP});
const saw = {
  ready: (await ask(client, 'ServerReady', {})).ready,
  outputs: (await ask(client, 'ModelMetadata', {name: 'mlp'})).outputs.map(output => output.name),
  probabilities: probabilities(await ask(client, 'ModelInfer', row())),
  packed: probabilities(await ask(packing, 'ModelInfer', row())),
};
try {
  await ask(client, 'ModelInfer', row('', 'nobody'));
} catch (error) {
  saw.refused = [grpc.status[error.code], error.details, error.metadata.get('grpc-status-details-bin').length];
}

saw.streamed = await new Promise((resolve, reject) => {
  const stream = client.ModelStreamInfer(), ids = [];
  stream.on('data', answer => ids.push(answer.infer_response.id)).on('error', reject).on('end', () => resolve(ids));
  for (let number = 0; number < 50; number++) stream.write(row(`${number}`));
  stream.end();
});

let retired = 0;
const watch = state => client.getChannel().watchConnectivityState(state, Infinity, () => {
  const next = client.getChannel().getConnectivityState(false);
  retired += state === grpc.connectivityState.READY;
  if (next !== grpc.connectivityState.SHUTDOWN) watch(next);
});
watch(client.getChannel().getConnectivityState(true));
saw.answered = saw.lost = 0;
for (const end = Date.now() + 1000 * SECONDS; retired < RETIREMENTS && Date.now() < end;) {
  const calls = Array.from({length: 20}, () => ask(client, 'ModelInfer', row()));
  const ended = await Promise.allSettled(calls);
  saw.answered += ended.filter(call => call.status === 'fulfilled').length;
  saw.lost += ended.filter(call => call.status === 'rejected').length;
}
saw.retired = retired;
console.log(JSON.stringify(saw));
process.exit(0);
