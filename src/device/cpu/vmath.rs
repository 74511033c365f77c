macro_rules! m { ($n:ident, $t:ty) => { pub mod $n { type T = $t;
 pub fn exp(x: T) -> T { x.exp() } pub fn ln(x: T) -> T { x.ln() } pub fn tanh(x: T) -> T { x.tanh() }
 pub fn erf(x: T) -> T { let x = x as f64; let mut s = x; let mut t = x; for n in 1..120 { t *= -x*x/(n as f64); s += t/(2*n+1) as f64; } ((if x.abs() > 5.0 { x.signum() } else { s*std::f64::consts::FRAC_2_SQRT_PI }) as T).clamp(-1.0, 1.0) }
 pub fn sigmoid(x: T) -> T { 1.0 / (1.0 + (-x).exp()) }
 pub fn gelu_erf(x: T) -> T { 0.5 * x * (1.0 + erf(x * (0.5 as T).sqrt())) }
 pub fn gelu_erf_grad(x: T) -> T { 0.5 * (1.0 + erf(x * (0.5 as T).sqrt())) + x * (-0.5 * x * x).exp() * 0.398942280401432677939946 }
 const K: T = 0.797884560802865355879892;
 pub fn gelu_tanh(x: T) -> T { 0.5 * x * (1.0 + (K * (x + 0.044715 * x * x * x)).tanh()) }
 pub fn gelu_tanh_grad(x: T) -> T { let t = (K * (x + 0.044715 * x * x * x)).tanh(); 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * K * (1.0 + 3.0 * 0.044715 * x * x) }
} } }
m!(f32, f32); m!(f64, f64);
