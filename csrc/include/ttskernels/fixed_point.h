// Fixed point: integers that share a float32 scale, which is their largest magnitude over a "most" value. Torch-free.
#pragma once

namespace ttsk {

// Of a weight, K or V as int16 or int8, and of what it is multiplied with: 64 products fit in int32 (4095 * 8191 * 64,
// 127 * 32767 * 64). int8 weights are multiplied with int8 (127 * 127, of which 192 fit easily), int8 K and V with int16.
constexpr float kMostWord = 4095.0f, kMostByte = 127.0f;
constexpr float kMostRowOfWords = 8191.0f, kMostRowOfBytes = 32767.0f;
constexpr int kByteZero = 128;          // what is added to an int8 weight, which is kept as an unsigned byte
constexpr int kMostUnits = 3;           // 64s of a group of int8 weights
constexpr float kTwoThirds = 2.0f / 3.0f;
constexpr int kByteTries = 8;           // numbers that the largest of a group of int8 weights may become
constexpr float kLeastScaled = 1e-30f;  // vectors of smaller values are zero

}  // namespace ttsk
