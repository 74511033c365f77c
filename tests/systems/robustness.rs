//! The robustness of text classifiers, on an artificial language whose words have a worth each, so that only the comparison with
//! TextAttack needs files.

use prismgrad::base::philox::Rng;
use prismgrad::systems::robustness::evaluate::attacked;
use prismgrad::systems::robustness::{
    Architecture, Attack, Batch, Classifier, Evaluate, Flag, Found, Importance, Lens, Misspellings, ModelConfig,
    Neighbours, Outcome, Output, Pgd, Precision, Report, Score, Served, Similarity, Synonyms, Text, TextModel, TextSet,
    Training, Vocabulary, WordClasses, WordVectors, accuracy_under_attack, augmented, data,
};
use prismgrad::{DType, Result};

const WORDS: usize = 240;

/// Worth of a word of the language: some speak for the second class, some against it, many do not matter.
fn worth(word: usize) -> f64 {
    [1.0, -1.0, 0.5, -0.5, 0.0, 0.0, 0.2, -0.2][word % 8]
}

fn name(word: usize) -> String {
    let letters = b"bdfgklmnprstvz";
    let vowels = b"aeiou";
    let letter = |n: usize| [letters[n % 14] as char, vowels[n / 14 % 5] as char];
    [letter(word), letter(word / 70 + 3), letter(word * 5 + 1)].iter().flatten().collect()
}

/// Texts of the language; one label in ten is turned, so that no model can be sure.
fn texts(count: usize, seed: u64) -> TextSet {
    let mut rng = Rng::new(seed);
    let (mut texts, mut labels) = (Vec::new(), Vec::new());
    while texts.len() < count {
        let words: Vec<usize> = (0..6 + rng.below(10)).map(|_| rng.below(WORDS as u64) as usize).collect();
        let sum: f64 = words.iter().map(|&w| worth(w)).sum();
        if sum.abs() > 0.3 {
            let mut names: Vec<String> = words.iter().map(|&w| name(w)).collect();
            names.insert(2, "the".into());
            texts.push(Text::of_words(&names));
            labels.push(u32::from((sum > 0.0) != (rng.uniform() < 0.1)));
        }
    }
    TextSet::new(texts, labels, vec!["bad".into(), "good".into()]).unwrap()
}

/// Each word has four of any worth in the place of synonyms: an attack can do a lot.
fn synonyms() -> Synonyms {
    let names: Vec<String> = (0..WORDS).map(name).collect();
    let pairs = (0..WORDS).flat_map(|w| [(w, (w + 3) % WORDS), (w, (w + 70) % WORDS)]);
    Synonyms::of_pairs(pairs.map(|(a, b)| (&names[a][..], &names[b][..])))
}

fn trained(architecture: Architecture, training: &Training) -> Classifier {
    let set = texts(1500, 1);
    let config = ModelConfig { architecture, width: 16, hidden: 16, classes: set.classes.clone() };
    let vocabulary = Vocabulary::of_texts(&set.texts, 2, 10_000);
    let model = Classifier::new(config, vocabulary, training.seed).unwrap();
    training.run(&model, &set, |_, _| {}).unwrap();
    model
}

fn short(seed: u64) -> Training {
    Training { epochs: 4, lr: 1e-2, seed, ..Training::default() }
}

fn report(served: &Served, attack: &Attack) -> Report {
    Evaluate::new(attack).run(served, &texts(300, 2), &texts(200, 3)).unwrap()
}

fn names(report: &Report) -> Vec<&'static str> {
    report.flags.iter().map(Flag::name).collect()
}

#[test]
fn the_illusion_and_its_end() {
    let model = trained(Architecture::Bag, &short(0));
    let (list, letters) = (synonyms(), Misspellings { seed: 5 });
    for attack in [Attack::pwws(&list), Attack::deep_word_bug(&letters)] {
        let at = |t: f64| report(&Served::new(&model).temperature(t), &attack);
        let honest = at(1.0);
        assert!(honest.clean > 0.8 && honest.plain.accuracy < 0.6 * honest.clean, "{honest}");
        for t in [1e-6, 1e-4, 1e9] {
            let r = at(t);
            assert_eq!(r.clean, honest.clean, "the class of no text changes");
            assert!(r.plain.accuracy > honest.plain.accuracy + 0.2, "T = {t:e}: {r}");
            for a in [&r.calibrated, &r.margin] {
                assert!((a.accuracy - honest.plain.accuracy).abs() <= 0.03, "T = {t:e}: {r}");
            }
            assert!((r.margin.accuracy - honest.margin.accuracy).abs() <= 0.005, "flat");
        }
        assert!((at(1e9).plain_f64.accuracy - honest.plain.accuracy).abs() <= 0.01, "64 bits cure under-confidence");
        assert!(at(1e-6).plain_f64.accuracy > honest.plain.accuracy + 0.2, "and not over-confidence");
        // Null control: near T = 1 there is nothing to be seen.
        for t in [0.5, 2.0] {
            assert!((at(t).plain.accuracy - honest.plain.accuracy).abs() <= 0.01);
        }
    }
}

#[test]
fn the_attackers_best_temperature_ends_it_too() {
    let model = trained(Architecture::Bag, &short(0));
    let (list, letters) = (synonyms(), Misspellings { seed: 5 });
    let (pwws, bug) = (Attack::pwws(&list), Attack::deep_word_bug(&letters));
    let run = |t: f64| {
        let served = Served::new(&model).temperature(t);
        Evaluate::new(&pwws).optimise(&bug).run(&served, &texts(100, 2), &texts(200, 3)).unwrap()
    };
    let (honest, r) = (run(1.0), run(1e-3));
    let best = r.optimised.as_ref().unwrap();
    assert!((best.accuracy - honest.plain.accuracy).abs() <= 0.03, "{r}");
    assert!(best.lens.temperature > 10.0, "{r}");
}

/// The order of words is lost, and comes back with calibration.
#[test]
fn importances_collapse_and_come_back() {
    let model = trained(Architecture::Bag, &short(0));
    let list = synonyms();
    let r = report(&Served::new(&model).temperature(1e-5), &Attack::pwws(&list));
    assert!(r.correlation.0 < 0.4 && r.correlation.1 > 0.9, "{:?}", r.correlation);
}

#[test]
fn each_planted_cause_fires_its_flag_and_ten_healthy_models_fire_none() {
    let list = synonyms();
    let attack = Attack::pwws(&list);
    for seed in 0..10 {
        let model = trained(Architecture::Bag, &short(seed));
        let r = report(&Served::new(&model), &attack);
        assert!(r.flags.is_empty(), "seed {seed}: {r}");
        if seed > 0 {
            continue;
        }
        assert!(r.to_string().contains("no flag"));
        let served = || Served::new(&model);
        let planted: [(&str, Served); 6] = [
            ("tied scores", served().temperature(1e-4)),
            ("rank collapse", served().temperature(1e-4)),
            ("calibration gap", served().temperature(1e-3)),
            ("precision disagreement", served().temperature(1e8)),
            ("double softmax", served().output(Output::Probabilities(DType::F32)).second_softmax()),
            ("rounded probabilities", served().temperature(0.1).output(Output::Probabilities(DType::F16))),
        ];
        for (flag, served) in &planted {
            let r = report(served, &attack);
            assert!(names(&r).contains(flag), "{flag}: {r}");
            let sentence = r.flags.iter().find(|f| f.name() == *flag).unwrap().to_string();
            assert!(sentence.starts_with(flag) && sentence.ends_with('.'), "{sentence}");
        }
        // Each of them alone does not look like another.
        assert!(!names(&report(&planted[3].1, &attack)).contains(&"double softmax"));
        assert!(!names(&report(&planted[4].1, &attack)).contains(&"precision disagreement"));
    }
}

#[test]
fn the_same_texts_are_found_with_any_batch_size_and_number_of_threads() {
    let (list, letters) = (synonyms(), Misspellings { seed: 5 });
    for architecture in [Architecture::Bag, Architecture::Encoder] {
        let model = trained(architecture, &Training { epochs: 1, lr: 3e-3, ..Training::default() });
        let set = texts(24, 4);
        for attack in [Attack::pwws(&list), Attack::deep_word_bug(&letters)] {
            for score in [Score::Margin, Score::Probability(Precision::F32)] {
                let run = |batch: usize, threads: usize| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| {
                        attack.clone().score(score).batch_size(batch).run(&Served::new(&model), &set).unwrap()
                    })
                };
                let want = run(4096, 2);
                assert!(want.iter().any(|f| f.outcome == Outcome::Broken), "{architecture:?}");
                for (batch, threads) in [(1, 1), (7, 3), (64, 2), (4096, 1)] {
                    assert_eq!(run(batch, threads), want, "{architecture:?}, batches of {batch}, {threads} threads");
                }
            }
        }
    }
}

/// Logits ±(sum of what the words are worth), by a table.
struct Table(Vec<(&'static str, f32)>);

impl TextModel for Table {
    fn classes(&self) -> usize {
        2
    }
    fn logits(&self, batch: &Batch) -> Result<Vec<f32>> {
        let worth = |w: &&str| self.0.iter().find(|e| e.0 == *w).map_or(0.0, |e| e.1);
        let sum = |i: usize| batch.get(i).iter().map(worth).sum::<f32>();
        Ok((0..batch.len()).flat_map(|i| [-sum(i), sum(i)]).collect())
    }
}

fn film() -> (Table, Synonyms, TextSet) {
    let model = Table(vec![("good", 1.0), ("great", 3.0), ("decent", -0.5), ("fine", 0.75), ("big", -1.0)]);
    let list = Synonyms::of_pairs([("good", "decent"), ("good", "fine"), ("great", "big"), ("film", "movie")]);
    let set = TextSet::new(vec![Text::new("a Great, good film")], vec![1], vec!["bad".into(), "good".into()]).unwrap();
    (model, list, set)
}

#[test]
fn a_search_by_hand() {
    let (model, list, set) = film();
    // The table has small letters only.
    let set = TextSet { texts: vec![Text::new("a great, good film")], ..set };
    let attack = Attack::pwws(&list).score(Score::Margin);
    let found = attack.run(&Served::new(&model), &set).unwrap().remove(0);
    // Worth 4 at first. Great matters most: big leaves 0, which is a tie of the classes, read as the first one.
    assert_eq!(
        (found.outcome, &found.changed[..], found.text(&set.texts[0]).source()),
        (Outcome::Broken, &[1][..], "a big, good film")
    );
    // One for the text, three unknown words, four candidates (great 1, good 2, film 1), one step of one candidate.
    assert_eq!(found.queries, 1 + 3 + 4 + 1);
    // DeepWordBug asks about unknown words, then four misspellings of one word.
    let letters = Misspellings { seed: 0 };
    let found = Attack::deep_word_bug(&letters).score(Score::Margin).run(&Served::new(&model), &set).unwrap().remove(0);
    assert!(found.queries <= 1 + 3 + 3 * 4 && found.changed[0] == 1, "{found:?}");
}

#[test]
fn limits_hold() {
    let (model, list, set) = film();
    let set = TextSet { texts: vec![Text::new("a great good good film")], ..set };
    let run = |a: Attack| a.score(Score::Margin).run(&Served::new(&model), &set).unwrap().remove(0);
    let free = run(Attack::pwws(&list));
    assert_eq!((free.outcome, free.changed.len()), (Outcome::Broken, 2));
    let one = run(Attack::pwws(&list).max_changed(0.2));
    assert_eq!((one.outcome, one.changed.len()), (Outcome::Stood, 1));
    for budget in [1, 3, 8, 12] {
        let found = run(Attack::pwws(&list).budget(budget));
        assert!(
            found.queries <= budget && found.out_of_budget == (found.outcome != Outcome::Broken),
            "{budget}: {found:?}"
        );
    }
    // From great to big it is five edits: g, r, e, a, t to b, i, g.
    assert!(!run(Attack::pwws(&list).max_edits(3)).changed.contains(&1));
}

/// Near words of vectors made from the texts, a limit on the similarity of the texts, and word classes.
#[test]
fn near_words_similarity_and_word_classes() {
    let (model, train) = (trained(Architecture::Bag, &short(0)), texts(1500, 1));
    let vectors = WordVectors::of_texts(&train.texts, 32, 0).retrofitted(&synonyms());
    let (near, similarity) = (Neighbours::new(vectors.clone(), 20, 0.3).unwrap(), Similarity::new(vectors));
    let (served, set) = (Served::new(&model), texts(60, 3));
    let run = |attack: Attack| attack.score(Score::Margin).run(&served, &set).unwrap();
    let broken = |found: &[Found]| found.iter().filter(|f| f.outcome == Outcome::Broken).count();
    let free = run(Attack::new("near words", &near, Importance::Delete));
    let limited = run(Attack::text_fooler(&near, &similarity));
    assert!(broken(&free) > 5 && broken(&limited) <= broken(&free), "{} {}", broken(&free), broken(&limited));
    for (found, text) in limited.iter().zip(&set.texts) {
        let original: Vec<&str> = text.words().collect();
        let words: Vec<&str> = found.words.iter().map(String::as_str).collect();
        for &at in &found.changed {
            assert!(near.get(original[at]).contains(&words[at]), "a near word");
        }
        // The last change was held against the text that it made.
        if let Some(&at) = found.changed.last() {
            assert!(similarity.of(&original, &words, at, words[at]) >= 0.8408);
        }
    }
    // Words with an even number are of one class, those with an odd number of another: few candidates are left.
    let classes = WordClasses::of((0..WORDS).map(|w| (name(w), 1 << (w % 2))));
    let list = synonyms();
    for found in run(Attack::pwws(&list).same_class(&classes)).iter().zip(&set.texts) {
        let original: Vec<&str> = found.1.words().collect();
        assert!(found.0.changed.iter().all(|&at| classes.fit(original[at], &found.0.words[at])));
    }
}

/// Only strictly better candidates are taken; where all scores are tied, nothing is.
#[test]
fn ties_are_not_taken() {
    let (model, list, set) = film();
    let served = Served::new(&model).temperature(1e-4);
    let found =
        Attack::pwws(&list).run(&served, &TextSet { texts: vec![Text::new("a great good good film")], ..set }).unwrap();
    assert_eq!((found[0].outcome, found[0].changed.len()), (Outcome::Stood, 0));
    assert!(found[0].ties > 0 && found[0].ties == found[0].steps);
}

/// A text that was found is judged by the model's class. An evaluator that took the class from probabilities in f32 would call
/// everything of an under-confident model the first class: the planted defect is seen.
#[test]
fn found_texts_are_judged_by_the_models_own_class() {
    let model = trained(Architecture::Bag, &short(0));
    let (list, set) = (synonyms(), texts(150, 3));
    let served = Served::new(&model).temperature(1e9);
    let attack = Attack::pwws(&list);
    let a = attacked(&attack, Lens::new(Score::Margin), &served, &set).unwrap();
    let changed: Vec<Text> = a.found.iter().zip(&set.texts).map(|(f, t)| f.text(t)).collect();
    let labels: Vec<u32> = a.found.iter().map(|f| f.label).collect();
    assert_eq!(labels, model.predict(&changed).unwrap());
    let answers = served.output(Output::Probabilities(DType::F32)).answer(&Batch::of_texts(&changed)).unwrap();
    assert_eq!(labels, answers.labels);
    let defect: Vec<u32> = (0..changed.len()).map(|i| u32::from(answers.row(i)[1] > answers.row(i)[0])).collect();
    assert_ne!(labels, defect, "the defect would not be noticed");
    let stood = labels.iter().zip(&set.labels).filter(|(a, b)| a == b).count() as f64;
    assert_eq!(a.accuracy, stood / set.len() as f64);
    assert_eq!(accuracy_under_attack(&a.found).0, a.accuracy);
}

/// What it says about inputs that it cannot use.
#[test]
fn bad_inputs_are_sentences() {
    struct Broken(f32);
    impl TextModel for Broken {
        fn classes(&self) -> usize {
            2
        }
        fn logits(&self, batch: &Batch) -> Result<Vec<f32>> {
            Ok(vec![self.0; 2 * batch.len()])
        }
    }
    let (model, list, set) = film();
    let attack = Attack::pwws(&list);
    let says = |r: Result<Vec<prismgrad::systems::robustness::Found>>, part: &str| {
        let message = r.unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    says(
        attack.run(&Served::new(&Broken(f32::NAN)), &set),
        "not evaluable: the model's logit of class 0 is NaN for the text",
    );
    says(
        attack.run(&Served::new(&model).output(Output::Labels), &set),
        "not evaluable: the model serves classes alone",
    );
    says(attack.run(&Served::new(&model).temperature(0.0), &set), "must be a positive number");
    says(attack.clone().budget(0).run(&Served::new(&model), &set), "at least one query");
    says(attack.run(&Served::new(&model), &TextSet { labels: vec![2], ..set.clone() }), "the label 2");
    let none = Evaluate::new(&attack).run(&Served::new(&model), &TextSet::default(), &set);
    assert!(none.unwrap_err().to_string().contains("0 validation texts"));
    // Stop words only: nothing to change, and the report says so.
    let stop =
        TextSet { texts: vec![Text::new("it is what it is"), Text::new("a great film")], labels: vec![0, 1], ..set };
    let r = Evaluate::new(&attack).run(&Served::new(&model), &stop, &stop).unwrap();
    assert_eq!((r.unchangeable, r.plain.found[0].outcome, r.plain.found[0].queries), (1, Outcome::Unchangeable, 1));
    assert!(r.to_string().contains("1 texts have no word that may be changed"), "{r}");
}

#[test]
fn a_model_is_written_and_read() {
    let folder = std::env::temp_dir().join(format!("prismgrad-robustness-{}", std::process::id()));
    for architecture in [Architecture::Bag, Architecture::Encoder] {
        let model = trained(architecture, &Training { epochs: 1, ..Training::default() });
        model.save(&folder, None).unwrap();
        let read = Classifier::load(&folder).unwrap();
        let set = texts(20, 9);
        let logits = |m: &Classifier| m.logits(&Batch::of_texts(&set.texts)).unwrap();
        assert_eq!(logits(&model), logits(&read));
        // Longer than the encoder reads, and empty.
        let mut batch = Batch::new();
        batch.push(["bad"; 100]);
        batch.push([]);
        assert_eq!(read.logits(&batch).unwrap().len(), 4);
    }
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(Classifier::load(&folder).is_err());
}

/// What training does to confidence: a training temperature widens the logits, smoothing narrows them; the defences train.
#[test]
fn trainings_differ_as_they_should() {
    let set = texts(200, 3);
    let spread = |training: &Training| {
        let model = trained(Architecture::Bag, training);
        assert!(model.accuracy(&set).unwrap() > 0.75, "{training:?}");
        let l = model.logits(&Batch::of_texts(&set.texts)).unwrap();
        l.chunks(2).map(|l| f64::from((l[0] - l[1]).abs())).sum::<f64>() / set.len() as f64
    };
    let plain = spread(&short(0));
    assert!(spread(&Training { temperature: 20.0, ..short(0) }) > 2.0 * plain);
    assert!(spread(&Training { label_smoothing: 0.3, ..short(0) }) < plain);
    spread(&Training { pgd: Some(Pgd { steps: 3, radius: 0.01 }), ..short(0) });
    spread(&Training { normalise: true, ..short(0) });
    spread(&Training { sgd: true, normalise: true, lr: 0.3, epochs: 20, ..short(0) });
    let model = trained(Architecture::Bag, &short(0));
    let (letters, train) = (Misspellings { seed: 1 }, texts(1500, 1));
    let more = augmented(&train, &model, &Attack::deep_word_bug(&letters), 100, 0).unwrap();
    assert!(more.len() > train.len() + 50 && more.len() <= train.len() + 100);
    let wrong = Training { temperature: 0.0, ..short(0) }.run(&model, &train, |_, _| {});
    assert!(wrong.unwrap_err().to_string().contains("training temperature"));
}

/// What TextAttack 0.3.11 found for 200 film reviews with the same model and candidates, and how often it asked the model
/// (`benches/peers/textattack_verdicts.py` wrote the file).
#[test]
fn textattack_finds_the_same() {
    let (Ok([_, _, test]), Ok(list)) = (data::reviews(), Synonyms::ppdb()) else {
        return crate::common::skip::skip(
            "the film reviews or PPDB's synonyms are not there; PRISMGRAD_DATA names their folder",
        );
    };
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/robustness");
    let model = Classifier::load(&folder).unwrap();
    let theirs: serde_json::Value = prismgrad::io::read_json(folder.join("textattack.json")).unwrap();
    let (set, letters) = (test.sample(200, 11), Misspellings { seed: 5 });
    for (name, attack) in [("pwws", Attack::pwws(&list)), ("deepwordbug", Attack::deep_word_bug(&letters))] {
        let ours = attack.run(&Served::new(&model), &set).unwrap();
        let theirs = theirs[name].as_array().unwrap();
        assert_eq!((ours.len(), theirs.len()), (200, 200));
        let verdict = |f: &Found| match f.outcome {
            Outcome::WrongFromStart => "wrong",
            Outcome::Broken => "broken",
            Outcome::Stood | Outcome::Unchangeable => "stood",
        };
        let same = |i: &usize| theirs[*i][0] == verdict(&ours[*i]);
        let verdicts = (0..200).filter(same).count();
        let queries = (0..200).filter(|i| same(i) && theirs[*i][1] == ours[*i].queries).count();
        println!("{name}: {verdicts} of 200 verdicts, {queries} of 200 query counts");
        for i in (0..200).filter(|i| theirs[*i][0] != verdict(&ours[*i]) || theirs[*i][1] != ours[*i].queries).take(5) {
            println!("text {i}: theirs {}, ours {} after {} queries", theirs[i], verdict(&ours[i]), ours[i].queries);
        }
        assert!(verdicts >= 198 && queries >= 198, "{name}: {verdicts} verdicts and {queries} query counts of 200");
    }
}
