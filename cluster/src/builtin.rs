//! The models inside the binary.

use shoal_protocol::model::BuiltinModel;

macro_rules! demo_file {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../demo-model/", $name)) as &[u8])
    };
}

/// A small Llama that does sums; `cluster/demo-model/README.md` says how it was trained.
pub const DEMO: BuiltinModel = BuiltinModel {
    name: "demo",
    files: &[
        demo_file!("config.json"),
        demo_file!("generation_config.json"),
        demo_file!("model.safetensors"),
        demo_file!("tokenizer.json"),
        demo_file!("tokenizer_config.json"),
    ],
};

/// All of them: what a coordinator and a worker are handed.
pub const ALL: &[BuiltinModel] = &[DEMO];

/// What `make demo` asks.
pub const DEMO_QUESTION: &str = "What is 47 plus 38?";
