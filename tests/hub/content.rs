//! Repositories as the hub has them: the goldens as models, among files that nobody here needs, and their texts as
//! datasets.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;
use parquet::basic;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use crate::repo::{Content, Files, Kind, Repository};

/// The model and the dataset of the command line's defaults.
pub const MODEL: &str = "Qwen/Qwen2.5-0.5B";
pub const WIKITEXT: &str = "Salesforce/wikitext";
/// The file of the default configuration and split.
pub const TRAIN: &str = "wikitext-2-raw-v1/train-00000-of-00001.parquet";

/// Files that repositories have beside those that a run reads. `consolidated.safetensors` and the folder `original`
/// hold the same weights once more in another layout, and can be as large as all the rest.
pub const DECOYS: [&str; 14] = [
    ".gitattributes",
    "LICENSE",
    "README.md",
    "adapter/adapter_model.safetensors",
    "consolidated.safetensors",
    "flax_model.msgpack",
    "ggml-model-q4_0.gguf",
    "model.fp16.safetensors",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "original/params.json",
    "pytorch_model-00001-of-00001.bin",
    "pytorch_model.bin",
    "tf_model.h5",
];

/// What a run may fetch of a model: its configuration, its tokenizer, its weights.
pub fn is_needed(path: &str) -> bool {
    let weights = path == "model.safetensors" || path.starts_with("model-00");
    let small = ["config.json", "generation_config.json", "model.safetensors.index.json"];
    let tokenizer = ["tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template"];
    weights || small.contains(&path) || tokenizer.iter().any(|start| path.starts_with(start))
}

/// The files of a golden that a repository of its model has, and no others.
pub fn golden(name: &str) -> Files {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    let mut files = Files::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if is_needed(&name) {
            let content = Content::new(&name, fs::read(entry.path()).unwrap());
            files.insert(name, content);
        }
    }
    files
}

/// A repository of a golden, with the decoys.
pub fn model(id: &str, name: &str) -> Repository {
    let mut files = golden(name);
    for path in DECOYS {
        files.insert(path.into(), Content::new(path, format!("nobody needs {path}").repeat(50)));
    }
    Repository::new(Kind::Model, id, files)
}

/// The texts of a golden's corpus.
pub fn texts(name: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name).join("corpus.jsonl");
    let corpus = fs::read_to_string(path).unwrap();
    let text = |line: &str| {
        serde_json::from_str::<serde_json::Value>(line).unwrap()["text"].as_str().unwrap().to_owned()
    };
    corpus.lines().map(text).collect()
}

/// Texts as lines of JSON.
pub fn json_lines(texts: &[String]) -> Vec<u8> {
    let line = |text: &String| serde_json::json!({ "text": text }).to_string() + "\n";
    texts.iter().map(line).collect::<String>().into_bytes()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Texts as the hub's own conversion writes them: a nullable column `text`, compressed with Snappy.
pub fn parquet(texts: &[String]) -> Vec<u8> {
    let schema = Arc::new(parse_message_type("message schema { optional binary text (UTF8); }").unwrap());
    let properties = WriterProperties::builder().set_compression(basic::Compression::SNAPPY).build();
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let values: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(text.as_str())).collect();
    let present = vec![1; values.len()];
    column.typed::<ByteArrayType>().write_batch(&values, Some(&present), None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

/// A dataset of four configurations with three splits each, like [`WIKITEXT`]. The default one's training split is
/// `texts` between empty ones, as there; what else there is must not be mistaken for it.
pub fn wikitext(texts: &[String]) -> Repository {
    let mut files = Files::new();
    let mut card = "---\nlanguage:\n- en\nsize_categories:\n- 1M<n<10M\ndataset_info:\n".to_owned();
    let configs = ["wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1"];
    for config in configs {
        card += &format!("- config_name: {config}\n  features:\n  - name: text\n    dtype: string\n");
    }
    card += "configs:\n";
    for config in configs {
        card += &format!("- config_name: {config}\n  data_files:\n");
        for split in ["test", "train", "validation"] {
            card += &format!("  - split: {split}\n    path: {config}/{split}-*\n");
            let shards = if config.contains("103") && split == "train" { 2 } else { 1 };
            for shard in 0..shards {
                let path = format!("{config}/{split}-{shard:05}-of-{shards:05}.parquet");
                let rows = match path == TRAIN {
                    true => texts.iter().flat_map(|text| [String::new(), text.clone()]).collect(),
                    false => other_texts(&path),
                };
                files.insert(path.clone(), Content::new(&path, parquet(&rows)));
            }
        }
    }
    card += "---\n\n# Dataset Card for \"wikitext\"\n\nconfigs:\n- not the front matter\n";
    files.insert("README.md".into(), Content::new("README.md", card));
    files.insert(".gitattributes".into(), Content::new(".gitattributes", "*.parquet filter=lfs\n"));
    Repository::new(Kind::Dataset, WIKITEXT, files)
}

/// Texts of the split in the file at `path`, long enough to be kept.
pub fn other_texts(path: &str) -> Vec<String> {
    (1..4)
        .map(|n| format!("Sentence {n} of the file {path}, which is another one than that of the defaults."))
        .collect()
}

/// A dataset whose one configuration is a packed file of JSON lines.
pub fn packed_lines(id: &str, texts: &[String]) -> Repository {
    let card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train.jsonl.gz\n\
                ---\n";
    let packed = gzip(&json_lines(texts));
    let files = [("README.md", card.as_bytes().to_vec()), ("data/train.jsonl.gz", packed)];
    let files = files.into_iter().map(|(path, bytes)| (path.to_owned(), Content::new(path, bytes)));
    Repository::new(Kind::Dataset, id, files.collect())
}
