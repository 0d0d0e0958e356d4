// SPDX-License-Identifier: Apache-2.0

//go:build race

package results

// raceEnabled shortens simulations, which are ten times slower under the race detector and have nothing for it to find.
const raceEnabled = true
