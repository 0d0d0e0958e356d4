// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// A constant is a number that stands in the programs for what is only known when they are loaded. The numbers are those of services.h.
type constant uint64

const (
	seed4Constant constant = 0x706c696d736f6c01 + iota
	seed6Constant
	secondSeed6Constant
	thirdSeed6Constant
	bucketMaskConstant
	peerNamesConstant
	refuseMarkConstant
	discardMarkConstant
	knowsInsidersConstant
	loopMarkConstant
)

// tableConstants are those by which programs find frontends.
func (b *Balancer) tableConstants() map[constant]uint64 {
	seeds6 := b.ipv6.table.seeds
	return map[constant]uint64{
		seed4Constant: b.ipv4.table.seeds[0], seed6Constant: seeds6[0], secondSeed6Constant: seeds6[1], thirdSeed6Constant: seeds6[2],
		bucketMaskConstant: uint64(len(b.ipv4.table.buckets) - 1),
	}
}

// setConstants puts values in the place of constants in all programs of a spec.
func setConstants(spec *ebpf.CollectionSpec, constants ...map[constant]uint64) error {
	for _, all := range constants {
		for c, value := range all {
			found := false
			for _, program := range spec.Programs {
				for i := range program.Instructions {
					instruction := &program.Instructions[i]
					if instruction.OpCode == asm.LoadImmOp(asm.DWord) && instruction.Src == 0 && uint64(instruction.Constant) == uint64(c) {
						instruction.Constant, found = int64(value), true
					}
				}
			}
			if !found {
				return fmt.Errorf("the embedded object lacks the constant %#x", uint64(c))
			}
		}
	}
	return nil
}

// truth is a constant that is a condition.
func truth(condition bool) uint64 {
	if condition {
		return 1
	}
	return 0
}
