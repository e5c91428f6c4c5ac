// llama.cpp in a process of its own, for generation.py: requests and answers in lines of JSON.
// Copied beside node_modules when it is run, because that is where node looks for packages.
import readline from "node:readline";
import {getLlama, InputLookupTokenPredictor, LlamaLogLevel} from "node-llama-cpp";

const [model_path, threads] = [process.argv[2], Number(process.argv[3])];
const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, maxThreads: threads, logLevel: LlamaLogLevel.error,
});
const model = await llama.loadModel({modelPath: model_path});
const context = await model.createContext({contextSize: 2304, batchSize: 512, threads, sequences: 1});
let drafts = false;
let sequence = context.getSequence();

// A sequence drafts for life or never.
function use(lookup) {
    if (lookup === drafts) return;
    sequence.dispose();
    sequence = context.getSequence(lookup ? {tokenPredictor: new InputLookupTokenPredictor()} : {});
    drafts = lookup;
}

const say = (answer) => process.stdout.write(JSON.stringify(answer) + "\n");

// Greedy; the first token's time is that of reading the prompt.
async function generate(ids, count) {
    await sequence.clearHistory();
    const seconds = [], tokens = [];
    let before = performance.now();
    for await (const token of sequence.evaluate(ids, {temperature: 0})) {
        const now = performance.now();
        seconds.push((now - before) / 1e3);
        tokens.push(token);
        before = now;
        if (tokens.length > count) break;
    }
    return {prefill_s: seconds[0], token_s: seconds.slice(1), tokens};
}

// Mean negative log-likelihood of all tokens after the first, by the library's own probabilities.
async function score(ids) {
    await sequence.clearHistory();
    const settings = {generateNext: {probabilities: true, options: {temperature: 1, topK: 0, topP: 1}}};
    let total = 0;
    await sequence.controlledEvaluate(ids.slice(0, -1).map((id) => [id, settings]), {
        onTokenResult(index, result) {
            total -= Math.log(result.next.probabilities.get(ids[index + 1]));
        },
    });
    return {nll: total / (ids.length - 1)};
}

say({ready: true, features: llama.systemInfo, release: llama.llamaCppRelease});
for await (const line of readline.createInterface({input: process.stdin})) {
    const request = JSON.parse(line);
    use(request.lookup ?? false);
    if (drafts) sequence.tokenPredictor.updateInputTokens(request.ids);
    say(await (request.do === "generate" ? generate(request.ids, request.new) : score(request.ids)));
}
process.exit(0);
